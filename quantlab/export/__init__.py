"""Low-bit weights in folders that other engines load: formats, one file each, and the folder they are written into."""
