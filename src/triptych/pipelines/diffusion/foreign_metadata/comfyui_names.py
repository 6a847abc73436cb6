"""What ComfyUI's samplers do with noise levels, also in programs that are built on it."""

# Samplers for which it computes a level more and leaves out the last but one (`KSampler.calculate_sigmas`).
COMFYUI_DISCARDS = ("dpm2", "dpm2-ancestral", "unipc")
# Our schedules -> those that it computes under their names.
COMFYUI_VARIANTS = {"beta": "beta-times", "align-your-steps": "multistep-align-your-steps"}
