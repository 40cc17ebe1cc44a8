"""What `--help` of a command says below its options: examples and exit statuses. Imports nothing heavy."""

EXIT_STATUS = """exit status:
  0 done, 1 failed while running, 2 bad input (one line says what was expected), 130 interrupted by Ctrl-C,
  75 pre-empted by SIGTERM or SIGUSR1 (train --resume goes on)"""

EXAMPLES = {
    "train": """  fastfuse train --method ffsd --model resnet20 --data digits --epochs 12 --batch-size 32
  fastfuse train --recipe cifar100-resnet32 --data-root data --download
  fastfuse train --method kd --model resnet20 --teachers runs/a --data cifar100
  fastfuse train --resume --out runs/my-run""",
    "eval": """  fastfuse eval runs/my-run
  fastfuse eval runs/my-run --data-root /elsewhere/data --json""",
    "compare": """  fastfuse compare runs/ffsd-seed0 runs/ffsd-seed1 runs/alone
  fastfuse compare runs/a runs/b --json""",
    "report": """  fastfuse report runs/my-run
  fastfuse report runs/ffsd-seed0 runs/ffsd-seed1 runs/alone --html ffsd.html""",
    "export": """  fastfuse export runs/my-run
  fastfuse export runs/my-run --format torch-export --best --fold-batchnorm
  fastfuse export runs/my-run --network student1 --out student1.safetensors""",
    "predict": """  fastfuse predict runs/my-run/export/leader.pt2 photo.png other.jpg
  fastfuse predict leader.pt2 photo.png --json""",
    "methods": """  fastfuse methods
  fastfuse methods --json""",
    "reconstruct": """  fastfuse reconstruct runs/a runs/b
  fastfuse reconstruct a.safetensors b.safetensors --teacher-model resnet56 --data cifar100 --epochs 10""",
    "info": """  fastfuse info
  fastfuse info --json""",
}


def below_options(command: str) -> str:
    """The examples of a command, where there are any, and what its exit status means."""
    examples = EXAMPLES.get(command)
    return f"examples:\n{examples}\n\n{EXIT_STATUS}" if examples else EXIT_STATUS
