"""Run by the original hqq's own interpreter: quantises, or loads and runs, the layers in a folder.

`original_worker.py write FOLDER` quantises FOLDER/inputs.pt and writes what the original makes of them.
`original_worker.py read FOLDER` loads FOLDER/ours.safetensors and FOLDER/ours.pt and writes what they dequantise to.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import hqq
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def outputs(layer, x):
    return {"dequantized": layer.dequantize(), "y": layer(x)}


def write(folder):
    encoded, raw, results = {}, {}, {}
    inputs = torch.load(folder / "inputs.pt")
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        dtype = getattr(torch, case["dtype"])
        linear = torch.nn.Linear(1, 1, bias=case["bias"])
        linear.weight.data = inputs[name]["W"].clone()
        linear.out_features, linear.in_features = linear.weight.shape
        if case["bias"]:
            linear.bias.data = inputs[name]["bias"].clone()
        config = BaseQuantizeConfig(nbits=case["nbits"], group_size=case["group_size"], axis=case["axis"])
        config["weight_quant_params"].update(view_as_float=case["view_as_float"], optimize=case["optimize"])
        layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        results[name] = outputs(layer, inputs[name]["x"].to(dtype))
        encoded.update({f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()})
        layer.encoded_state_dict = False
        raw[name] = layer.state_dict()
    save_file(encoded, folder / "theirs.safetensors")
    torch.save(raw, folder / "theirs.pt")
    torch.save(results, folder / "results.pt")


def read(folder):
    encoded = load_file(folder / "ours.safetensors")
    raw = torch.load(folder / "ours.pt", weights_only=True)
    inputs = torch.load(folder / "inputs.pt")
    results = {"encoded": {}, "raw": {}}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        dtype = getattr(torch, case["dtype"])
        for form in results:
            layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
            layer.encoded_state_dict = form == "encoded"
            if form == "encoded":
                state = {k[len(name) + 1 :]: v for k, v in encoded.items() if k.startswith(name + ".")}
            else:
                state = raw[name]
            layer.load_state_dict(state)
            results[form][name] = outputs(layer, inputs[name]["x"].to(dtype))
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    assert hqq.__version__.startswith("0.2."), f"this interpreter has hqq {hqq.__version__}, not the original"
    with torch.no_grad():
        {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
