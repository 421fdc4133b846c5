"""From what a network gives to pretrained and downstream logits.

A vision model gives the S pretrained logits, which the mapping turns into T downstream ones. A CLIP's logits are a
linear image of its D-dimensional image embedding, and so is what any linear mapping makes of them: its network gives
embeddings, the mapping is folded into a (D, T) matrix, and the S logits (32,157 per image for sun397) are formed for
estimating alone.
"""

import torch


class Readout:
    """Of a vision model: the network's outputs are the pretrained logits.

    Attributes
    ----------
    width : int
        Numbers per image that the network gives.
    """

    def __init__(self, mapping):
        self.mapping, self.width = mapping, mapping.num_source

    def pretrained(self, outputs):
        """Pretrained logits (n, S) of the network's outputs (n, width)."""
        return outputs

    def downstream(self, outputs):
        """Downstream logits (n, T), float32, of the network's outputs; differentiable as the mapping is."""
        return self.mapping(outputs)

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
        self.net, self.width = net, net.text_embeddings.shape[1]
        self._folded = None

    def pretrained(self, outputs):
        return self.net.logits(outputs)

    def downstream(self, outputs):
        if self.mapping.trainable and torch.is_grad_enabled():  # it changes with every step
            weights, bias = self.net.fold(*self.mapping.affine())
        else:
            weights, bias = self._folded
        with torch.autocast(outputs.device.type, enabled=False):
            return torch.addmm(bias, outputs.float(), weights)

    @torch.no_grad()
    def hold(self):
        self._folded = self.net.fold(*(None if part is None else part.detach() for part in self.mapping.affine()))
