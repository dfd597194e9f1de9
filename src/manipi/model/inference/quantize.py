"""Matrices as an engine keeps them: as they are, or in 8 bits.

    kind           weights                      activations                    products
    none           the model's dtype            the compute dtype              torch's own
    int8_weights   int8, one scale per output   the compute dtype              expanded before each product: less memory
    int8           int8, one scale per output   int8, scaled at each product   int8 with int32 sums
    fp8            e4m3, one scale per output   e4m3, one scale per row        a GPU's, compute capability 8.9 or later

Activations of `int8` have a scale per row on a GPU; on a processor one per call, as its kernels take them.

Shape suffixes: R rows, I input features, O output features.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manipi.errors import ConfigError, unknown_name

Quantization: TypeAlias = Literal["none", "int8_weights", "int8", "fp8"]

MakeMatrix: TypeAlias = Callable[[Tensor, Tensor | None], nn.Module]
"""A weight [O, I] and a bias [O] or None to a module that computes `x Wᵀ + b` in the dtype of x."""

FEWEST_ROWS = 32
"""`torch._int_mm` on a GPU refuses 16 rows and fewer; missing ones are added as zeros."""


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in for a model of that dtype: float32 on processors that emulate bfloat16, a sixth as fast."""
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if device.type != "cpu" or native else torch.float32


def maker(kind: Quantization, device: torch.device, dtype: torch.dtype) -> MakeMatrix:
    """What makes matrices of that kind on that device.

    Raises:
        ConfigError: an unknown kind, or fp8 on a device that has none.
    """
    if kind not in get_args(Quantization):
        raise unknown_name("quantization", kind, get_args(Quantization), next="choose one of them")
    if kind == "none":
        return lambda weight, bias: Plain(weight, bias, dtype)
    if kind == "int8_weights":
        return Int8Weights
    if kind == "int8":
        return PackedInt8 if device.type == "cpu" else Int8Rows
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            expected="a GPU with fp8 products: compute capability 8.9 or later (Ada, Hopper, Blackwell)",
            found=torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device.type}",
            where="quantization fp8",
            next="choose int8, which every device has",
        )
    return Float8


class Plain(nn.Module):
    """The matrix in the model's dtype, cast once instead of at every call where that is the dtype of x."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", weight_OI.to(dtype))
        self.register_buffer("bias", None if bias_O is None else bias_O.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    __call__ = forward  # without the hooks of a module, which cost microseconds: a chunk takes hundreds of products


class Coded(nn.Module):
    """A weight in 8 bits, with one scale for each output."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    dtype: ClassVar[torch.dtype] = torch.int8

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        super().__init__()
        codes_OI, scale_O1 = encode(weight_OI, self.dtype)
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scale", scale_O1[:, 0])
        self.register_buffer("bias", None if bias_O is None else bias_O.float())


class Int8Weights(Coded):
    """Half the memory of bfloat16, in the arithmetic of the activations."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.codes.to(x.dtype) * self.scale[:, None].to(x.dtype), bias)


class Int8Rows(Coded):
    """`torch._int_mm` between rows of activations and outputs of the weight, each with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        codes_RI, scale_R1 = encode(x.flatten(0, -2), self.dtype)
        rows = len(codes_RI)
        codes_RI = F.pad(codes_RI, (0, 0, 0, max(FEWEST_ROWS - rows, 0)))
        sums_RO = torch.ops.aten._int_mm(codes_RI, self.codes.t())[:rows]
        y_RO = sums_RO * scale_R1 * self.scale
        return (y_RO if self.bias is None else y_RO + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


class PackedInt8(nn.Module):
    """oneDNN's int8 product for processors, with one scale and zero point for all activations of a call.

    Without VNNI pairs of products are summed in 16 bits, which hold 7 bits of an activation times 8 of a weight.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        super().__init__()
        codes_OI, scale_O1 = encode(weight_OI, torch.int8)
        self.register_buffer("codes", torch.ops.onednn.qlinear_prepack(codes_OI, None), persistent=False)
        self._scale, self._bias = scale_O1[:, 0].contiguous(), None if bias_O is None else bias_O.float()
        self._zero = torch.zeros_like(self._scale, dtype=torch.int32)
        self._levels = 255 if torch.cpu._is_vnni_supported() else 127

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        low, high = (float(edge) for edge in x32.aminmax())
        low, high = min(low, 0.0), max(high, 1e-12)
        scale = (high - low) / self._levels
        zero = round(-low / scale)
        codes = (x32 / scale).add_(zero).round_().clamp_(0, self._levels).to(torch.uint8)
        # Sums in float32 out of the kernel: its bfloat16 output is a thousand times slower without AVX-512.
        weights, output = (self.codes, self._scale, self._zero), (1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(codes, scale, zero, *weights, self._bias, *output).to(x.dtype)


class Float8(Coded):
    """`torch._scaled_mm` in e4m3, with scales per row and per output."""

    dtype = torch.float8_e4m3fn

    def forward(self, x: Tensor) -> Tensor:
        codes_RI, scale_R1 = encode(x.flatten(0, -2), self.dtype)
        y_RO = torch.ops.aten._scaled_mm(codes_RI, self.codes.t(), scale_R1, self.scale[None], out_dtype=torch.bfloat16)
        y_RO = y_RO if self.bias is None else y_RO + self.bias.to(y_RO.dtype)
        return y_RO.to(x.dtype).unflatten(0, x.shape[:-1])


def encode(x_RI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [R, I] in int8 or e4m3 and scales float32 [R, 1], symmetric around zero: `x ≈ codes · scale`."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 127.0
    scale_R1 = x_RI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / largest
    scaled_RI = x_RI.float() / scale_R1
    return (scaled_RI if dtype.is_floating_point else scaled_RI.round()).to(dtype), scale_R1
