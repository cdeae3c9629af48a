"""The smallest folder that looks like a model's."""

import json
import struct


def make_model(folder):
    """Make a folder with a configuration, a tokenizer and weights of two numbers."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "model.safetensors").write_bytes(content)
    return folder
