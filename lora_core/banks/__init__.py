"""How each method's users are rows: one file a method."""
