"""A CLIP-shaped model that means something without CLIP's weights.

Its image tower is a real ImageNet classifier: the embedding of an image x is

    sum_k p_k(x) e(name of label k),

p the classifier's probabilities and e(.) an encoder of short texts, the same that embeds the prompts. The
encoder is the TF-IDF of character trigrams: it knows that "oxeye daisy" has to do with "daisy" and nothing
more, enough for zero-shot classification to beat chance on flowers and to give a mapping something to learn.
"""

import math

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import nn

from models.clip import Clip


class TextEncoder:
    """TF-IDF of character trigrams, (n, D) float32; fitted to the texts it is made with."""

    def __init__(self, texts):
        self.vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3), sublinear_tf=True)
        self.vectorizer.fit(texts)

    def __call__(self, texts):
        return torch.from_numpy(self.vectorizer.transform(texts).toarray()).float()


class ImageTower(nn.Module):
    """Normalised images to sum_k p_k e(name_k), (n, D)."""

    def __init__(self, classifier, name_embeddings):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("name_embeddings", name_embeddings)

    def forward(self, images):
        return self.classifier(images).softmax(dim=1) @ self.name_embeddings


class MeaningfulClip(nn.Module):
    """The parts of an open_clip model that `Clip` asks for; its tokens are the encoder's vectors."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.0)))

    def encode_text(self, tokens):
        return tokens


def build_meaningful_clip(classifier, class_names):
    """A `models.clip.Clip` around an ImageNet classifier, a `models.Classifier` with ``source_names``."""
    encoder = TextEncoder([*classifier.source_names, *class_names])
    model = MeaningfulClip(ImageTower(classifier, encoder(classifier.source_names)))
    return Clip(model, encoder, "meaningful-clip", classifier.input_size, classifier.mean, classifier.std)
