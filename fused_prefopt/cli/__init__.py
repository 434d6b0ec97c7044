"""The command line `fused-prefopt`: a file for each command, and for each noun they deal with."""
