"""From what a network gives to pretrained and downstream logits.

A vision model gives the S pretrained logits, which the mapping turns into T downstream ones. A CLIP's logits are a
linear image of its D-dimensional image embedding, and so is what any linear mapping makes of them: its network gives
embeddings, the mapping is folded into a (D, T) matrix, and the S logits (32,157 per image for sun397) are formed for
estimating alone. A mapping of the embedding itself (lda) needs none of that.
"""

import torch


class Readout(torch.nn.Module):
    """Of a vision model, whose outputs are the pretrained logits, or of a mapping that reads what the network gives.

    Attributes
    ----------
    width : int
        Numbers per image that the network gives.
    """

    def __init__(self, mapping):
        super().__init__()
        self.mapping, self.width = mapping, mapping.num_source

    def pretrained(self, outputs):
        """Pretrained logits (n, S), or whatever else the mapping reads, of the network's outputs (n, width)."""
        return outputs

    def downstream(self, outputs):
        """Downstream logits (n, T), float32, of the network's outputs; differentiable as the mapping is."""
        return self.mapping(outputs)

    def as_module(self):
        """A module that does what `downstream` does, with the mapping as it is now."""
        return self.mapping

    def hold(self):
        """Note that the mapping stays as it is until the next call."""


class ClipReadout(Readout):
    """Of a vision-language model: the network's outputs are image embeddings.

    Parameters
    ----------
    mapping : mapping.LabelMapping
    net : models.clip.ClipNet
    """

    def __init__(self, mapping, net):
        super().__init__(mapping)
        self.width = net.text_embeddings.shape[1]
        self._net = (net,)  # in a tuple: not a submodule, but for what changes between steps
        device = net.text_embeddings.device
        self.register_buffer("_weights", torch.zeros(self.width, mapping.num_target, device=device))
        self.register_buffer("_bias", torch.zeros(mapping.num_target, device=device))

    def pretrained(self, outputs):
        return self._net[0].logits(outputs)

    def downstream(self, outputs):
        if self.mapping.trainable and torch.is_grad_enabled():  # it changes with every step
            weights, bias = self._fold()
        else:
            weights, bias = self._weights, self._bias
        with torch.autocast(outputs.device.type, enabled=False):
            return torch.addmm(bias, outputs.float(), weights)

    def as_module(self):
        self.hold()
        linear = torch.nn.Linear(*self._weights.shape).requires_grad_(False)
        linear.weight.copy_(self._weights.T)
        linear.bias.copy_(self._bias)
        return linear

    @torch.no_grad()
    def hold(self):
        weights, bias = self._fold()
        self._weights.copy_(weights)
        self._bias.copy_(bias)

    def _fold(self):
        return self._net[0].fold(*self.mapping.affine())
