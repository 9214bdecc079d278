"""Learns classes task by task: any method, any image data set, any backbone.

Plainly, or on whatever `accelerate config` describes, with options from a YAML file and the command line:

    python recipes/class_incremental.py recipes/quickstart.yaml
    accelerate launch recipes/class_incremental.py recipes/blood_cells.yaml --method acl --seed 1
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from backbone import ModelArguments, adapter_config, choose_adapter, load_model
from going_on import load_learned
from options import DataArguments, RunArguments, check_run, parse_arguments
from publishing import check_publishing, publish, without_hub

import dynammo_peft
from dynammo_peft import (
    METHODS,
    Checkpoints,
    ClassIncrementalScenario,
    Learner,
    Method,
    Results,
    Task,
)
from dynammo_peft.data import load_image_dataset
from dynammo_peft.hub import check_can_push, save_model
from dynammo_peft.training.sharded import set_up_sharding


logger = logging.getLogger("class_incremental")


def load_method(args: RunArguments, model_args: ModelArguments, method_args: Any) -> tuple[Method, Any]:
    """The method, new or as it was when its learning state was saved, and the image processor."""
    if model_args.load_learning_state is not None:
        return load_learned(model_args, method_args)
    model, image_processor = load_model(model_args)
    model_args.adapter = choose_adapter(model_args, model)
    return METHODS[args.method](model, method_args, adapter_config(model_args)), image_processor


def load_scenario(
    args: DataArguments, method: Method, image_processor: Any, progress: bool
) -> ClassIncrementalScenario:
    """The tasks to come, with all images decoded."""
    if args.exemplars_in_data_set and not method.exemplar_rows:
        raise ValueError("exemplars_in_data_set is set, but the learning state names no row as an exemplar.")
    # Held-out images take the place of test images, so that there need be none.
    test_split = None if args.validation_fraction else args.test_split
    train, test = load_image_dataset(
        args.dataset_name, args.dataset_config_name, args.data_dir, args.train_split, test_split, args.streaming
    )
    return ClassIncrementalScenario(
        train,
        test,
        image_processor,
        classes_per_task=args.classes_per_task,
        groups=args.groups,
        seed=args.class_order_seed,
        domain_column=args.domain_column,
        domains=args.domains,
        validation_fraction=args.validation_fraction,
        image_column=args.image_column,
        label_column=args.label_column,
        horizontal_flip=args.horizontal_flip,
        vertical_flip=args.vertical_flip,
        crop_padding=args.crop_padding,
        learned=method.groups,
        exemplar_rows=method.exemplar_rows if args.exemplars_in_data_set else (),
        cache_dir=args.cache_dir,
        progress=progress,
    )


def report_task(accelerator: Accelerator, task: Task, tasks: int, results: Results) -> None:
    """One line for a task just learned."""
    measures = results.metrics()
    by_task = " ".join(f"{accuracy:.3f}" for accuracy in measures["accuracy_matrix"][-1])
    accelerator.print(
        f"Task {task.index + 1}/{tasks} ({', '.join(task.class_names)}): accuracy "
        f"{measures['last_accuracy']:.3f} on {task.seen_classes} classes (by task: {by_task}), "
        f"{results.seconds[-1]:.0f} s"
    )


def report_cost(method: Method, scenario: ClassIncrementalScenario) -> dict[str, Any]:
    """What one image costs with all tasks learned, and with the base model alone."""
    model, device = method.model, method.accelerator.device
    image = torch.zeros(1, 3, *scenario.image_size, device=device)
    learned = dynammo_peft.forward_cost(model, lambda: method.logits(image))
    folded = dynammo_peft.forward_cost(model, lambda: method.logits(image), folded=True)
    with model.disable_adapter():
        base = dynammo_peft.forward_cost(model, lambda: model(pixel_values=image))
    return {
        "multiply_adds": learned.multiply_adds,
        "multiply_adds_base": base.multiply_adds,
        "ratio": learned.flops / base.flops,
        "ratio_folded": folded.flops / base.flops,
        "parameters": learned.parameters,
        "parameters_base": base.parameters,
    }


def run(argv: list[str]) -> tuple[Method, Results]:
    """Everything: parses `argv`, learns all tasks, reports and saves.

    Raises:
        ValueError: If an option or the data are unusable; nothing was trained or written then. Or the Hub refuses the
            model, which is saved then.
        ConnectionError: If the Hub cannot be reached.
        OSError: If a file cannot be read or written; `CheckpointError` if it is a checkpoint.
    """
    args, model_args, data_args, method_args = parse_arguments(argv, description=__doc__)
    goes_on = model_args.load_learning_state is not None
    if not goes_on:
        check_publishing(args, model_args, method_args)
    folder, overwrite = f"{args.output_dir}-checkpoints", args.overwrite_output_dir
    checkpoints = Checkpoints(folder, args.save_steps, args.save_total_limit, overwrite)
    check_run(args, model_args, data_args, checkpoints)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or None,
        project_dir=f"{args.output_dir}-logs" if args.report_to else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )
    set_up_sharding(accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = check_can_push(args.hub_model_id, private=args.hub_private_repo)
    transformers.set_seed(method_args.seed)
    # Before the images, which take longer to read than options to be refused.
    method, image_processor = load_method(args, model_args, method_args)
    if goes_on:
        # Only now it is known what there is to publish.
        check_publishing(args, model_args, method_args)
    with accelerator.main_process_first():
        scenario = load_scenario(data_args, method, image_processor, progress=accelerator.is_main_process)
    method_options = {**asdict(model_args), **asdict(data_args), **asdict(method_args)}
    options = {**without_hub(asdict(args)), **method_options}
    # A resumed run is the same run.
    del options["resume_from_checkpoint"]
    if args.report_to:
        # TensorBoard takes plain values only.
        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in options.items()}
        accelerator.init_trackers("dynammo_peft", config=plain)
    learner = Learner(method, accelerator, args.eval_batch_size, True, checkpoints, args.dataloader_num_workers)
    results = learner.fit(
        scenario,
        after_task=lambda task, results: report_task(accelerator, task, len(scenario), results),
        resume_from_checkpoint=args.resume_from_checkpoint,
    )
    if accelerator.is_main_process:
        cost = finish(args, method, scenario, image_processor, results, options)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # After the others are done: they need not wait for an upload.
    if args.push_to_hub and accelerator.is_main_process:
        more = (scenario, image_processor, results, method_options, cost)
        print(f"Published at {publish(args, model_args, data_args, method, *more)}")
    return method, results


def finish(
    args: RunArguments,
    method: Method,
    scenario: ClassIncrementalScenario,
    image_processor: Any,
    results: Results,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Reports the measures and the cost, and saves the model and `results.json`; returns the cost."""
    measures, cost = results.metrics(), report_cost(method, scenario)
    print(
        f"Last accuracy {measures['last_accuracy']:.3f}, average incremental accuracy "
        f"{measures['average_incremental_accuracy']:.3f}, forgetting {measures['forgetting']:.3f}, mean class recall "
        f"{measures['mean_class_recall']:.3f}"
    )
    in_the_weights = ""
    if cost["ratio_folded"] < cost["ratio"]:
        in_the_weights = f" ({cost['ratio_folded']:.3f} with LoRA in its weights)"
    print(
        f"One forward pass: {cost['multiply_adds'] / 1e6:.1f} M multiply-adds, {cost['ratio']:.3f} times the base "
        f"model's {cost['multiply_adds_base'] / 1e6:.1f} M{in_the_weights}; {cost['parameters'] / 1e6:.2f} M "
        f"parameters against {cost['parameters_base'] / 1e6:.2f} M"
    )
    adapters = list(method.model.peft_config) if args.save_task_adapters else method.inference_adapters
    learned = method if args.save_learning_state else None
    save_model(method.model, args.output_dir, adapters, image_processor, learning_state_of=learned)
    results.save(Path(args.output_dir) / "results.json", options=options, cost=cost)
    print(f"Saved to {args.output_dir}: {', '.join(adapters)}")
    return cost


def main() -> None:
    """Runs the command line; bad input ends in one line."""
    logging.basicConfig(level=logging.WARNING)
    # What a method decides on its own.
    logging.getLogger("dynammo_peft").setLevel(logging.INFO)
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as error:
        logger.debug("Traceback:", exc_info=True)
        # Other libraries' errors may be of several lines.
        sys.exit(f"error: {' '.join(str(error).splitlines())}")


if __name__ == "__main__":
    main()
