"""Disks of micro-VMs as files: what an image looks like to a guest, and where its writes go.

Rooms: geometry (pure: floppy or hard disk, cylinders, heads and sectors), overlay (the format of a file of
changed sectors), files (opening, locking, committing: for whoever has a file system, never a worker).
"""
