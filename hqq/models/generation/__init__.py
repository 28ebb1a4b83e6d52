"""The parts of HFGenerator: prompts, the static cache, one decoding step, sampling and text as it comes."""
