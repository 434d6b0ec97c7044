"""What the papers of α-DPO, γ-PO and DRO claim, as experiments on a model that a CPU can train."""
