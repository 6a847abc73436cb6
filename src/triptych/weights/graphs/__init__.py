"""Networks as graphs for other runtimes: ONNX, torch.export, OpenVINO.

Read `parts.py` (which graphs a network has), `formats.py` (how one is written and run), then `exporting.py`.
"""
