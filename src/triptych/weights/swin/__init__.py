"""Published formats of the Swin Transformer, one module each; they share the table in `key_layout.py`."""

from triptych.weights.swin.hf import FORMAT as HF_FORMAT
from triptych.weights.swin.microsoft import FORMAT as MICROSOFT_FORMAT
from triptych.weights.swin.timm import FORMAT as TIMM_FORMAT
from triptych.weights.swin.torchvision import FORMAT as TORCHVISION_FORMAT

# timm's keys are Microsoft's except for patch merging and the classifier.
FORMATS = (TIMM_FORMAT, MICROSOFT_FORMAT, TORCHVISION_FORMAT, HF_FORMAT)
