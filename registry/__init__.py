"""What exists, whose it is and where it lies: the registry, the store and the pull client.  No torch in here."""
