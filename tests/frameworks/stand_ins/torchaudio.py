"""Stands for torchaudio, which LLaMA-Factory imports to read sound, where no wheel fits the torch.

The wheels of PyPI for Linux want CUDA's libraries. Whatever is called here fails.
"""
