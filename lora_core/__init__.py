"""Tensors and text in, weights and scores out: the training core knows no database and no orchestrator."""
