"""Claims of the papers of α-DPO, γ-PO and DRO, as experiments on a model that a CPU can train."""
