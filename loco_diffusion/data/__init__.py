"""Where pictures come from: the procedural world, image folders and data sets."""
