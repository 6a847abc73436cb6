"""The Swin Transformer's published formats, a file each; `layout.py` is the one table they share."""

from triptych.weights.swin.hf import FORMAT as HF_FORMAT
from triptych.weights.swin.microsoft import FORMAT as MICROSOFT_FORMAT
from triptych.weights.swin.timm import FORMAT as TIMM_FORMAT
from triptych.weights.swin.torchvision import FORMAT as TORCHVISION_FORMAT

# timm's names are Microsoft's but for where merging and the classifier stand.
FORMATS = (TIMM_FORMAT, MICROSOFT_FORMAT, TORCHVISION_FORMAT, HF_FORMAT)
