"""Layouts: the mesh of ranks, the placement of layers, pipeline schedules and the ZeRO engine. Nothing here knows what an MTP
depth is."""
