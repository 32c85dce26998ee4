"""What ``gemmlet train gan`` does, from checked options to the files in ``--out``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import metrics, nn
from ..nn.gan import LINEAR_IN_PIECES
from . import evaluation, files
from .common import percent
from .training import Array, Defaults, Options, Watch

if TYPE_CHECKING:
    from PIL.Image import Image


def _optimizers(rate: float) -> dict[str, nn.Optimizer]:
    # A beta1 of 0.5: Radford et al., 2016.
    return {"sgd": nn.SGD(0.1), "adam": nn.Adam(rate, beta1=0.5), "adamw": nn.AdamW(rate, beta1=0.5)}


# Two hidden layers, as with one far fewer samples are recognised. Steps count, not images: larger mini-batches take
# less time for an epoch, and more of them.
DEFAULTS = Defaults((256, 512), ("relu", "leaky_relu"), 24, 64, "adam", _optimizers(2e-3), lr_decay=True)
CLASSIC = Defaults((256,), ("tanh", "tanh"), 30, 128, "adam", _optimizers(1e-3), lr_decay=False)

# Of the discriminator, which wins without; where its activation allows it.
GRADIENT_PENALTY = 0.1
# The first bias of a pixel: its sigmoid is the mean of the digits' pixels.
OUTPUT_BIAS = -2.0
# Of samples: they are recognised more often, at a Fréchet distance that is hardly greater.
TEMPERATURE = 0.94

# How many samples a generator is judged by, how many a picture of them shows, and about how many pictures there are.
JUDGED, SHOWN, PICTURES = 1000, 100, 12
# The classifier that judges them: its hidden layer, and its epochs.
JUDGE_HIDDEN, JUDGE_EPOCHS = 128, 10


def run(options: Options) -> int:
    """Train a GAN, write the results to the folder ``--out`` and return the exit status."""
    # A covariance, as in the Fréchet distance, needs two.
    watch = Watch(nn.GAN, options, DEFAULTS, CLASSIC, least=2)
    settings = watch.settings
    if settings.classic:
        model = nn.GAN.classic(seed=settings.seed)
    else:
        generator_activation, discriminator_activation = settings.activation
        has_penalty = discriminator_activation in LINEAR_IN_PIECES
        if not has_penalty:
            watch.say(
                f"Without gradient penalty: the discriminator's {discriminator_activation} is not linear in pieces"
            )
        model = nn.GAN(
            generator=[*settings.hidden, 784],
            discriminator=[*reversed(settings.hidden), 1],
            n_classes=10,
            generator_activation=generator_activation,
            discriminator_activation=discriminator_activation,
            generator_output="sigmoid",
            generator_output_bias=OUTPUT_BIAS,
            temperature=TEMPERATURE,
            gradient_penalty=GRADIENT_PENALTY if has_penalty else 0.0,
            seed=settings.seed,
        )
    model.discriminator_dropout, model.discriminator_input_dropout = settings.dropout, settings.input_dropout
    judge = nn.MLP([784, JUDGE_HIDDEN, 10], "relu", seed=settings.seed)
    watch.more_epochs = _judging_epochs(model, judge)
    pages = _Pages(model, watch)
    every = max(1, round(settings.epochs / PICTURES))

    def callback(p: nn.GANProgress) -> None:
        watch.see(p, {"generator loss": p.generator_loss, "discriminator loss": p.discriminator_loss})
        if p.epoch_done and (p.epoch % every == 0 or p.epoch == p.epochs):
            pages.draw(p.epoch)

    with watch:
        pages.start()
        with watch.bar():
            fit = partial(
                model.fit,
                watch.data.x_train.reshape(-1, 28, 28),
                y=watch.data.y_train if model.n_classes else None,
                lr_schedule=_schedule if settings.lr_decay else None,
                callback=callback,
                augment=settings.augment,
            )
            history = watch.fit(model, fit)
            scores: dict[str, Any] = {}
            with watch.attempting("scores"):
                scores = _judge(model, judge, watch)
                watch.write_metrics(scores)
        if scores:
            _show(scores, history, watch)
        with watch.attempting("pictures"):
            plots = watch.plots()
            trained = history.generator_loss, history.discriminator_loss
            watch.draw(plots.gan_losses, "loss_curves.png", *trained, model.label_smoothing)
            if scores:
                watch.draw(plots.class_shares, "class_shares.png", scores["class_shares"])
            pages.finish(len(history.generator_loss))
        return watch.end()


def _schedule(done: float) -> float:
    """A learning rate that stays for the first half, and then falls to 0."""
    return min(1.0, 2.0 * (1.0 - done))


class _Pages:
    """The pictures of samples, all from the same noise: after some epochs, at the end, and one after the other."""

    def __init__(self, model: nn.GAN, watch: Watch) -> None:
        self._model, self._watch, self._out = model, watch, watch.settings.out
        self._noise = model.noise(SHOWN, seed=watch.settings.seed)
        files.check_folder(self._out / "samples")

    def start(self) -> None:
        """Draw what the untrained generator makes, unless a training goes on."""
        files.make_folder(self._out, "samples")
        if not self._watch.resumes:
            for old in (self._out / "samples").glob("epoch_*.png"):
                old.unlink()  # those of an earlier run, which may have had more epochs
            self.draw(0)

    def draw(self, epoch: int) -> None:
        """Draw the samples after an epoch."""
        with self._watch.attempting("samples"):
            from . import plots

            plots.save_image(self._page(epoch), self._grid(f"epoch {epoch}"))

    def finish(self, epochs: int) -> None:
        """Draw the samples of the end, in the last of so many epochs, and an animation."""
        from . import plots

        is_whole = self._page(epochs).exists()
        last = self._grid(f"epoch {epochs}" if is_whole else f"epoch {epochs}, interrupted")
        self._watch.draw(plots.save_image, "samples.png", last)
        earlier = [page for epoch in range(epochs) if (page := self._page(epoch)).exists()]
        self._watch.draw(plots.save_animation, "samples.gif", [*map(plots.load_image, earlier), last])

    def _page(self, epoch: int) -> Path:
        return self._out / "samples" / f"epoch_{epoch:04}.png"

    def _grid(self, title: str) -> Image:
        from . import plots

        return plots.sample_grid(self._model.sample(SHOWN, z=self._noise), title)


def _judging_epochs(model: nn.GAN, judge: nn.MLP) -> float:
    """About as many epochs of the GAN as to train the judge takes: by the matmuls for an image, forward and back."""
    generator, discriminator, judging = (
        sum(array.size for array in parameters)
        for parameters in (model.generator_parameters, model.discriminator_parameters, judge.parameters)
    )
    # The discriminator goes forward for an image and twice for a sample, and back for each, once to the sample only.
    return JUDGE_EPOCHS * 3 * judging / (3 * generator + 8 * discriminator)


def _judge(model: nn.GAN, judge: nn.MLP, watch: Watch) -> dict[str, Any]:
    """Train the judge, and measure samples with it."""
    data, seed = watch.data, watch.settings.seed
    watch.console.print("Training the classifier that judges the samples.")
    judge.fit(
        data.x_train,
        data.y_train,
        epochs=JUDGE_EPOCHS,
        batch_size=64,
        optimizer="adam",
        callback=watch.see_more,
        callback_every="call",
    )
    samples = model.sample(JUDGED)  # all classes in turn, where there are some
    real_features = judge.features(data.x_test)
    probabilities = judge.predict_proba(samples)
    scores = evaluation.sample_quality(probabilities, judge.features(samples), real_features)
    if model.n_classes:
        asked = np.arange(JUDGED) % model.n_classes
        scores["asked_digit_share"] = float(np.mean(probabilities.argmax(axis=1) == asked))
    # What genuine digits score, for comparison: as many training images.
    genuine: Array = data.x_train[np.random.default_rng(seed).permutation(len(data.x_train))[:JUDGED]]
    scores["frechet_distance_of_genuine_digits"] = metrics.frechet_distance(judge.features(genuine), real_features)
    scores["samples_judged"] = JUDGED
    scores["classifier_accuracy"] = judge.evaluate(data.x_test, data.y_test)["accuracy"]
    return scores


def _show(scores: dict[str, Any], history: nn.GANHistory, watch: Watch) -> None:
    accuracy, rarest = percent(scores["classifier_accuracy"]), int(np.argmin(scores["class_shares"]))
    recognised = scores.get("asked_digit_share")
    asked = {} if recognised is None else {"recognised as the digit that was asked for": percent(recognised)}
    watch.show(
        f"What a classifier ({accuracy} right on the test images) makes of {JUDGED:,} samples",
        {
            f"classified with a probability of at least {evaluation.CONFIDENT}": percent(scores["confident_share"]),
            **asked,
            f"share of the rarest digit ({rarest})": percent(scores["class_shares"][rarest]),
            "Fréchet distance to the test images": f"{scores['frechet_distance']:.2f}",
            "the same for genuine training images": f"{scores['frechet_distance_of_genuine_digits']:.2f}",
            "training time": f"{history.seconds:.1f} s",
        },
    )
