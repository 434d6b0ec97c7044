"""The commands of `fused-prefopt`: a file for each noun they deal with."""
