"""From users' files to tokens: readers, examples, snapshots, splits, rendering, packing."""
