"""Effects, order, retries and the command line: where the registry and the training core meet."""
