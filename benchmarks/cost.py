"""What DynaMMo costs, as ratios measured in one run: forward time and FLOPs, stage 2, a training step, and the merge.

    python benchmarks/cost.py
    python benchmarks/cost.py --model_name_or_path facebook/deit-tiny-patch16-224 --device cuda

Timings alternate between the things compared, so that a machine that changes its speed changes it for all; each figure
is the median.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dynammo_peft import DynammoConfig, DynammoLoraConfig, forward_cost
from dynammo_peft.data import ClassStatistics, choose_ridge, fit_affine_map
from dynammo_peft.merging import learn_merge_weights
from dynammo_peft.merging.optimization import EVALUATION_BATCHES
from dynammo_peft.methods import DynammoArguments
from dynammo_peft.methods.acl import ACL
from dynammo_peft.methods.analytic import linear_discriminant
from dynammo_peft.methods.two_stage import heads_step
from dynammo_peft.tuner.heads import heads_loss


CLASSES_PER_TASK = 2
# A small task, as two kinds of blood cells: its images, and how many of them one step of training sees.
TASK_IMAGES, TRAIN_BATCH = 600, 32
AIM = "<= 1.05 FLOPs, 1.10 time"
# Weights do not matter to cost, so the models are made from their configurations: no download.
MODELS = {
    "DeiT-Tiny": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    ),
    "ResNet-18": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    ),
}


def median_times(functions, repeats, synchronize):
    """Median seconds of each function, called in turn."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, times):
            start = time.perf_counter()
            function()
            synchronize()
            if repeat:  # The first round warms up.
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in times]


def class_names(task):
    return [f"class {task * CLASSES_PER_TASK + place}" for place in range(CLASSES_PER_TASK)]


def adapted(base, tasks, config_cls=DynammoConfig, **options):
    """A copy of the base model with an adapter a task and the merged one, which is active."""
    names = [f"task_{task:03d}" for task in range(tasks)]
    model = get_peft_model(copy.deepcopy(base), config_cls(classes=class_names(0), **options), names[0])
    for task, name in enumerate(names[1:], start=1):
        model.add_adapter(name, config_cls(classes=class_names(task), **options))
    model.add_weighted_adapter(names, adapter_name="merged", combination_type="anchored_mean")
    model.set_adapter("merged", inference_mode=True)
    return model.eval(), names


def acl_of(model, names):
    """The unmerged method on the adapters of `model`."""
    method = ACL(model)
    method.adapters = names
    return method


def forward_rows(base, images, repeats, synchronize):
    """Merged against base at 1, 10 and 50 tasks, and ACL against merged at 10."""
    models = {tasks: adapted(base, tasks) for tasks in (1, 10, 50)}
    acl = acl_of(*models[10])
    one = images[:1]
    flops = {tasks: forward_cost(model, lambda model=model: model(one)).flops for tasks, (model, _) in models.items()}
    base_flops = forward_cost(base, lambda: base(one)).flops
    acl_flops = forward_cost(acl.model, lambda: acl.logits(one)).flops
    acl.model.set_adapter("merged", inference_mode=True)
    runs = [lambda: base(images), *(lambda model=model: model(images) for model, _ in models.values())]
    with torch.no_grad():
        base_time, *times = median_times(runs, repeats, synchronize)
        acl_time, merged_time = median_times(
            [
                lambda: acl.logits(images),
                lambda: (acl.model.set_adapter("merged", inference_mode=True), acl.model(images)),
            ],
            max(3, repeats // 4),
            synchronize,
        )
    for tasks, seconds in zip(models, times):
        yield (
            f"merged / base, {tasks} tasks",
            flops[tasks] / base_flops,
            seconds / base_time,
            AIM,
        )
    yield "acl / merged, 10 tasks", acl_flops / flops[10], acl_time / merged_time, ">= 9.5 FLOPs"


def lora_rows(base, images, repeats, synchronize):
    """Merged LoRA against base at 1, 10 and 50 tasks; and in the weights."""
    one, runs, flops = images[:1], [lambda: base(images)], {}
    base_flops = forward_cost(base, lambda: base(one)).flops
    for tasks in (1, 10, 50):
        model, _ = adapted(base, tasks, DynammoLoraConfig)
        folded = copy.deepcopy(model)
        folded.merge_adapter()
        for place, own in (("", model), (" in the weights", folded)):
            runs.append(lambda own=own: own(images))
            label = f"merged LoRA{place} / base, {tasks} tasks"
            flops[label] = forward_cost(own, lambda own=own: own(one)).flops
    with torch.no_grad():
        base_time, *times = median_times(runs, repeats, synchronize)
    for (label, count), seconds in zip(flops.items(), times):
        yield label, count / base_flops, seconds / base_time, ""


def head_stage_row(base, images, repeats, synchronize):
    """An epoch of stage 2 with features computed anew against one with features computed once."""
    model, _ = adapted(base, 10)
    head = model.head.heads["merged"].requires_grad_(True)
    sizes = model.head.sizes["merged"]
    labels = torch.arange(len(images), device=images.device) % sum(sizes)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)

    def features():
        with torch.no_grad(), model.head_output("features"):
            return model(images).logits

    def train(inputs):
        loss, _ = heads_step(head(inputs), labels, sizes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cached = features()
    epochs = 50
    slow, fast = median_times([lambda: train(features()), lambda: train(cached)], repeats, synchronize)
    # The features are computed once for all epochs; their share counts.
    once = slow - fast
    yield f"stage 2, {epochs} epochs: recomputed / cached", None, epochs * slow / (once + epochs * fast), ">= 20 time"


def training_row(base, images, repeats, synchronize):
    """A step of stage 1 against a step of LoRA (r=8 on the attention) on the same base."""
    labels = torch.arange(len(images), device=images.device) % CLASSES_PER_TASK
    ours = get_peft_model(copy.deepcopy(base), DynammoConfig(classes=class_names(0)), "task_000").train()
    lora_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    lora = get_peft_model(copy.deepcopy(base), lora_config).train()
    optimizers = [
        torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
        for model in (ours, lora)
    ]

    def step(loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours_step():
        with ours.head_output("logits"):
            step(heads_loss(ours(images).logits, labels, (CLASSES_PER_TASK,)), optimizers[0])

    def lora_step():
        step(F.cross_entropy(lora(images).logits, labels), optimizers[1])

    ours_time, lora_time = median_times([ours_step, lora_step], repeats, synchronize)
    yield "stage 1 step / LoRA step (r=8, attention)", None, ours_time / lora_time, ""


def merging_rows(base, images, repeats, synchronize):
    """What comes after stage 1 against an epoch of it: the merge, learned merge weights, and heads in closed form."""
    model, names = adapted(base, 10)
    trained = get_peft_model(copy.deepcopy(base), DynammoConfig(classes=class_names(0)), "task_000").train()
    batch = images[:1].repeat(TRAIN_BATCH, 1, 1, 1)
    labels = torch.arange(TRAIN_BATCH, device=images.device) % CLASSES_PER_TASK
    steps = 2

    def train():
        for _ in range(steps):
            with trained.head_output("last_layer_logits"):
                heads_loss(trained(batch).logits, labels, (CLASSES_PER_TASK,)).backward()
            trained.zero_grad()

    def learn(granularity, times):
        batches = [(batch, labels)]
        learn_merge_weights(model, names, batches, granularity=granularity, steps=times * steps, progress=False)

    def merge():
        model.add_weighted_adapter(names, adapter_name="merged", combination_type="anchored_mean")

    features = torch.randn(2 * TASK_IMAGES, model.head.heads["merged"].in_features)

    def heads():
        known = ClassStatistics()
        known.update(features, torch.arange(len(features)) % (10 * CLASSES_PER_TASK))
        moved, own = features + 0.1, torch.arange(len(features)) % CLASSES_PER_TASK
        known.move(fit_affine_map(features, moved, choose_ridge(features, moved, own)))
        linear_discriminant(known, 0.1)

    granularities = ("task", "layer", "channel")
    learning = [lambda name=name, times=times: learn(name, times) for name in granularities for times in (1, 2)]
    runs = [train, merge, heads, *learning]
    train_time, merge_time, heads_time, *learn_times = median_times(runs, max(3, repeats // 4), synchronize)
    epoch = train_time / steps * TASK_IMAGES / TRAIN_BATCH
    yield "merging 10 adapters / an epoch of stage 1", None, merge_time / epoch, "< 1 time"
    yield "statistics, drift and heads / an epoch", None, heads_time / epoch, ""
    learning_steps = DynammoArguments().weights_steps
    for name, once, twice in zip(granularities, learn_times[::2], learn_times[1::2]):
        step = (twice - once) / steps
        # What is not a step is the loss before and after, here of one batch, and of at most 8 where there are so many.
        ratio = (learning_steps * step + EVALUATION_BATCHES * (once - steps * step)) / epoch
        yield f"learning {learning_steps} steps of weights by {name} / an epoch", None, ratio, "< 2 time"


def measure(name, base: PreTrainedModel, args, synchronize):
    """Prints the table of one base model."""
    base = base.to(args.device).eval()
    size = getattr(base.config, "image_size", 224)
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    print(f"\n{name}, {size} px, batch {args.batch_size}, median of {args.repeats}\n{'':45} {'FLOPs':>7} {'time':>7}")
    rows = [forward_rows, head_stage_row, merging_rows]
    if any(module_name.endswith("q_proj") for module_name, _ in base.named_modules()):
        rows += [training_row, lora_rows]
    for make in rows:
        for label, flops, seconds, aim in make(base, images, args.repeats, synchronize):
            print(f"{label:45} {'' if flops is None else f'{flops:.3f}':>7} {seconds:7.3f}  {aim}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="Measure this model instead of the built-in ones.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images a forward.")
    parser.add_argument("--repeats", type=int, default=15, help="Timed rounds.")
    parser.add_argument("--device", default="cpu", help="As PyTorch names it.")
    args = parser.parse_args()
    torch.manual_seed(0)
    cuda = torch.device(args.device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {where}")
    if args.model_name_or_path:
        base = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
        measure(args.model_name_or_path, base, args, synchronize)
        return
    for name, make in MODELS.items():
        measure(name, make(), args, synchronize)
    paper, _ = adapted(MODELS["ResNet-18"]().eval(), 1, preset="paper")
    cost = forward_cost(paper, lambda: paper(torch.randn(1, 3, 224, 224)))
    print(f"\nResNet-18 with preset='paper', 224 px: {cost.multiply_adds / 1e9:.2f} G multiply-adds (paper: 2.61)")


if __name__ == "__main__":
    main()
