"""The stages of a run, one file each: what it reads, and how it is made from the rooms."""
