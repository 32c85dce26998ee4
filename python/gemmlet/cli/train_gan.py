"""What ``gemmlet train gan`` does, from checked options to the files in ``--out``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import nn
from . import evaluation, files, training
from .files import make_folder
from .training import Defaults, Options, Watch

if TYPE_CHECKING:
    from PIL.Image import Image

# A beta1 of 0.5: Radford et al., 2016.
_OPTIMIZERS = {"sgd": nn.SGD(0.1), "adam": nn.Adam(1e-3, beta1=0.5), "adamw": nn.AdamW(1e-3, beta1=0.5)}
# Two hidden layers, as with one far fewer samples are recognised; and with 2e-4 and mini-batches of 64 it takes longer.
DEFAULTS = Defaults((256, 512), 30, 128, "adam", _OPTIMIZERS, lr_decay=False)
CLASSIC = Defaults((256,), 30, 128, "adam", _OPTIMIZERS, lr_decay=False)

# How many samples a generator is judged by, how many a picture of them shows, and about how many pictures there are.
JUDGED, SHOWN, PICTURES = 1000, 100, 12
# The classifier that judges them: its hidden layer, and its epochs.
JUDGE_HIDDEN, JUDGE_EPOCHS = 128, 10


def run(options: Options) -> int:
    """Train a GAN, write the results to the folder ``--out`` and return the exit status."""
    from . import plots

    # A covariance, as in the Fréchet distance, needs two.
    watch = Watch(options, CLASSIC if options.classic else DEFAULTS, least=2)
    settings, data = watch.settings, watch.data
    if settings.classic:
        model = nn.GAN.classic(seed=settings.seed)
    else:
        model = nn.GAN(
            generator=[*settings.hidden, 784], discriminator=[*reversed(settings.hidden), 1], seed=settings.seed
        )
    pictures = make_folder(settings.out, "samples")
    for old in pictures.glob("epoch_*.png"):
        old.unlink()  # those of an earlier run, which may have had more epochs
    noise = model.noise(SHOWN, seed=settings.seed)
    every = max(1, round(settings.epochs / PICTURES))
    shown: dict[int, Image] = {}  # by how many steps the generator had taken

    def grid(title: str) -> Image:
        samples = model.sample(SHOWN, z=noise)
        training.check_finite(samples)
        shown[model.steps] = plots.sample_grid(samples, title)
        return shown[model.steps]

    def picture(epoch: int) -> None:
        plots.save_image(pictures / f"epoch_{epoch:04}.png", grid(f"epoch {epoch}"))

    def callback(p: nn.GANProgress) -> None:
        watch.see(p, {"generator loss": p.generator_loss, "discriminator loss": p.discriminator_loss})
        if p.epoch_done and (p.epoch % every == 0 or p.epoch == p.epochs):
            picture(p.epoch)

    with watch:
        picture(0)
        with watch.bar():
            history = model.fit(
                data.x_train,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                optimizer=settings.optimizer,
                callback=callback,
                callback_every="call",
            )
        if model.steps not in shown:
            grid(f"epoch {len(history.generator_loss)}, interrupted")
        plots.save_animation(settings.out / "samples.gif", list(shown.values()))
        plots.save_image(settings.out / "samples.png", shown[model.steps])
        _finish(model, history, watch)
    return 130 if watch.interrupted else 0


def _finish(model: nn.GAN, history: nn.GANHistory, watch: Watch) -> None:
    """Save the network, measure its samples, and write and show what came out."""
    from . import plots

    settings, data = watch.settings, watch.data
    out = settings.out
    model.save(out / "model.safetensors")
    watch.console.print("Training the classifier that judges the samples.")
    judge = nn.MLP([784, JUDGE_HIDDEN, 10], "relu", seed=settings.seed)
    judge.fit(data.x_train, data.y_train, epochs=JUDGE_EPOCHS, batch_size=64, optimizer="adam")
    judge_accuracy = judge.evaluate(data.x_test, data.y_test)["accuracy"]
    samples = model.sample(JUDGED)
    real_features = judge.features(data.x_test)
    quality = evaluation.sample_quality(judge.predict_proba(samples), judge.features(samples), real_features)
    # What genuine digits score, for comparison: as many training images.
    genuine = data.x_train[np.random.default_rng(settings.seed).permutation(len(data.x_train))[:JUDGED]]
    genuine_distance = evaluation.frechet_distance(judge.features(genuine), real_features)
    metrics = {**quality, "frechet_distance_of_genuine_digits": genuine_distance, "samples_judged": JUDGED}
    metrics |= {"classifier_accuracy": judge_accuracy, **watch.facts(history.seconds)}
    metrics["history"] = training.curves(history, "generator_loss", "discriminator_loss")
    files.write_json(out / "metrics.json", metrics)
    plots.gan_losses(out / "loss_curves.png", history.generator_loss, history.discriminator_loss)
    plots.class_shares(out / "class_shares.png", quality["class_shares"])
    rarest = int(np.argmin(quality["class_shares"]))
    confident = training.percent(quality["confident_share"])
    watch.finish(
        f"What a classifier ({judge_accuracy:.2%} right on the test images) makes of {JUDGED:,} samples",
        {
            f"classified with a probability of at least {evaluation.CONFIDENT}": confident,
            f"share of the rarest digit ({rarest})": training.percent(quality["class_shares"][rarest]),
            "Fréchet distance to the test images": f"{quality['frechet_distance']:.2f}",
            "the same for genuine training images": f"{genuine_distance:.2f}",
            "training time": f"{history.seconds:.1f} s",
        },
    )
