"""The parts of `rlhf.py`: a reward model, samples of a policy, and a clipped policy gradient."""
