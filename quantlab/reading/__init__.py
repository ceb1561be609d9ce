"""Folders of low-bit weights read with numpy alone: independent of the code that writes them. No torch."""
