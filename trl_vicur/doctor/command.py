"""The command `trl-vicur doctor`."""

from .packages import check_packages


def doctor(arguments: list[str]) -> None:
    """
    Run `trl-vicur doctor`.

    Raises:
        `ValueError`: If something would stop the training run.
    """
    packages, unmet = check_packages()
    if unmet:
        # The other checks need these packages
        print_section("Packages", packages)
        raise ValueError(
            "Packages are missing or not supported. Fix it with: pip install " + " ".join(map(repr, unmet))
        )

    from tqdm.auto import tqdm

    from .machine import describe_devices, describe_kernels, describe_rollout_engines
    from .training import TrainingCheck, parse_arguments

    script_args, model_args, training_args, recovery_args, launch_plan = parse_arguments(arguments)
    print_section("Packages", packages)
    print_section("Devices", describe_devices())
    print_section("Fused kernels and other packages", describe_kernels())
    print_section("Rollouts", describe_rollout_engines())
    if model_args.model_name_or_path is None:
        if script_args.dataset_name is not None:
            raise ValueError(
                "Checking a dataset needs the model's processor and chat template. Name the model with `--model`."
            )
        return

    check = TrainingCheck(script_args, model_args, training_args, recovery_args, launch_plan)
    print_section(f"Model: {model_args.model_name_or_path}", check.describe_model())
    if script_args.dataset_name is None:
        return
    print_section(f"Dataset: {script_args.dataset_name}", check.describe_datasets())
    num_errors = 0
    for error in check.find_bad_rows():
        num_errors += 1
        tqdm.write(f"  {error}")  # above the progress bar
    if num_errors:
        raise ValueError(f"A training would stop for {num_errors:,} reason(s), listed above. Fix or remove the rows.")
    print("  every row can be trained on")


def print_section(title: str, lines: list[tuple[str, str]]) -> None:
    """Print a title and one line for each finding."""
    width = max(len(name) for name, _ in lines) + 2
    print(title)
    for name, finding in lines:
        print(f"  {name:<{width}}{finding}")
    print()
