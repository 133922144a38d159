"""Run a script in a new process that has torch and transformers already: the imports take longer than most tests."""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRELOADED = ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.data", "safetensors.torch", "PIL.Image",
             "transformers", "transformers.generation", "transformers.models.auto.modeling_auto",
             "transformers.models.auto.tokenization_auto", "transformers.models.clip.modeling_clip",
             "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama"]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PRELOADED)             # nothing of this project: each script reads its own files


def run(command, env):
    """python COMMAND in ROOT with the environment `env` -> CompletedProcess with the output as text.

    What is read while torch or transformers is imported (OMP_NUM_THREADS, HF_HUB_OFFLINE) stays as it was in the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/stdout", f"{folder}/stderr"]
        process = processes.Process(target=script, args=(command, env, paths))
        process.start()
        process.join()
        texts = [open(path, encoding="utf-8", newline="").read() for path in paths]
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def script(argv, env, paths):
    """Become python ARGV: a script, or -c and a program."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(paths, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    here = os.path.dirname(__file__)
    program = argv.pop(1) if argv[0] == "-c" else None
    place = "" if program else os.path.dirname(os.path.abspath(argv[0]))
    sys.path = [place, *(path for path in sys.path if path not in (here, ROOT))]
    sys.argv = argv
    if program:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(argv[0], run_name="__main__")
