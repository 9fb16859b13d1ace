"""Folders of captioned images as datasets: what is read, drawn and kept."""
