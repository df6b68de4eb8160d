"""Which base model an adapter belongs to, told by a sample of its numbers."""

from torch import nn

from common.tensors import digest

_SAMPLED = 1024  # numbers of each tensor: fine-tuning changes nearly all of them
_DIGITS = 16


def base_fingerprint(encoder: nn.Module) -> str:
    """Return 16 hexadecimal digits that tell a frozen encoder's weights from any others.

    The same on every device, and taken in no time even from a large model: a client may be a new
    process for every message. It finds a mistake, not a forgery: numbers between the sampled ones
    are not looked at. Of a quantised encoder it sees what was not quantised (embeddings, norms,
    biases), since packed numbers may differ from one device to another.
    """
    sampled = {
        name: parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLED)]
        for name, parameter in encoder.named_parameters()
        if parameter.is_floating_point()
    }
    return digest(sampled)[:_DIGITS]
