"""A model for lmms-eval (EvolvingLMMs-Lab, version 0.7): its benchmarks asked of a checkpoint.

    python tools/lmms_eval_model.py --model_args checkpoint=out/paper/sft --tasks mme --batch_size 8

All flags are those of `python -m lmms_eval`; this script adds --model langbridge. In another
program, register "lmms_eval_model.LangBridge" as the class of a simple model.
"""
import os
import sys
from itertools import groupby

TOOLS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TOOLS, os.path.dirname(TOOLS)]

import torch
try:
    from lmms_eval.api.model import lmms
except ImportError:
    sys.exit("lmms_eval_model.py: this needs lmms-eval: pip install lmms_eval 'filelock<4'")

import common
from checkpoint import load
from conversation import IGNORE, IMAGE, encode, encode_prompt
from generate import generate
from support import pictures
from support.device import own_device


class LangBridge(lmms):
    """A checkpoint of this project. Images are padded to a square, as in eval.py.

    Arguments of --model_args: checkpoint, dtype (default bfloat16 on a GPU, else float32).
    """

    def __init__(self, checkpoint, batch_size=1, device=None, dtype=None, max_batch_size=None):
        super().__init__()
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        device = own_device(device, most=None)
        dtype = dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
        self.batch_size = int(batch_size)
        self.vlm = load(checkpoint, device, getattr(torch, dtype))

    def turn(self, request):
        """Return (message, images, counts): a user's turn, its PIL images and the ids of each."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        visuals = list(doc_to_visual(doc) or []) if doc_to_visual else []
        if any(isinstance(visual, (str, dict)) for visual in visuals):
            raise ValueError("this model sees images only, no video and no sound")
        if IMAGE not in context:
            context = f"{IMAGE}\n" * len(visuals) + context
        counts = [self.vlm.num_tokens(image.size) for image in visuals]
        return {"role": "user", "content": context}, visuals, counts

    def pixels(self, images):
        """Return {"pixel_values", "picture_sizes"} of PIL images, as VLM.splice takes them."""
        pixels = [pictures.tile_pixels(image.convert("RGB"), **self.vlm.image_settings, mode="pad",
                                       tiles=self.vlm.config.tiles) for image in images]
        return {"pixel_values": torch.cat(pixels) if pixels else None,
                "picture_sizes": [image.size for image in images]}

    def answer(self, prompts, images, max_new_tokens, temperature):
        """Return the text of the answer to each prompt. images: those of all prompts, in order."""
        answers = generate(self.vlm, prompts, max_new_tokens=max_new_tokens,
                           temperature=temperature, **self.pixels(images))
        return [self.vlm.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def generate_until(self, requests):
        """Return the answer to each request, a list of strings in the requests' order."""
        prepared = []
        for index, request in enumerate(requests):
            settings = request.args[1]
            message, images, counts = self.turn(request)
            ids = encode_prompt([message], self.vlm.tokenizer, counts)
            is_sampled = settings.get("do_sample", bool(settings.get("temperature")))
            temperature = (settings.get("temperature") or 1.0) if is_sampled else 0.0
            shared = settings.get("max_new_tokens", 1024), temperature      # by a batch
            prepared.append((shared, -len(ids), index, ids, images))
        answers = [""] * len(requests)
        prepared.sort(key=lambda p: p[:3])                                  # longest first
        for shared, group in groupby(prepared, key=lambda p: p[0]):
            group = list(group)
            for start in range(0, len(group), self.batch_size):
                _, _, indices, prompts, images = zip(*group[start:start + self.batch_size])
                for index, text in zip(indices, self.answer(prompts, sum(images, []), *shared)):
                    context, settings = requests[index].args[:2]
                    answers[index] = cut_at(text, settings.get("until") or [])
                    self.cache_hook.add_partial("generate_until", (context, settings),
                                                answers[index])
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests):
        """Return (loss, whether greedy decoding would say it) of each continuation.

        lmms-eval takes the choice of the lowest number. The number is therefore the mean loss of a
        token, as its own models return it, and not a log-likelihood.
        """
        results = []
        for request in requests:
            message, images, counts = self.turn(request)
            continuation = request.args[1]
            if callable(continuation):
                task, split = request.args[4:]
                continuation = continuation(self.task_dict[task][split][request.args[3]])
            answer = {"role": "assistant", "content": str(continuation).strip()}
            ids, labels = encode([message, answer], self.vlm.tokenizer, counts)
            self.vlm.check_positions(len(ids))
            embeds = self.vlm.splice(torch.tensor([ids]), **self.pixels(images))
            output = self.vlm.llm.get_decoder()(inputs_embeds=embeds, use_cache=False)
            targets = torch.tensor(labels[1:], device=embeds.device)
            trained = targets != IGNORE
            logits = self.vlm.logits(output.last_hidden_state[0, :-1][trained])
            loss = torch.nn.functional.cross_entropy(logits, targets[trained]).item()
            results.append((loss, logits.argmax(dim=-1).equal(targets[trained])))
        return results

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("this model answers one round only")


def cut_at(text, ends):
    """Return the text up to the first of the strings that end it."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()


def main():
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest("langbridge", simple_class_path="lmms_eval_model.LangBridge"))
    sys.argv[1:1] = ["--model", "langbridge"]
    cli_evaluate()


if __name__ == "__main__":
    common.run_script(main)
