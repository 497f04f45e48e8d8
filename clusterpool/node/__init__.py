"""The node process: one per host, the only one that speaks to the control store and to other nodes."""
