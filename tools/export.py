"""Write a checkpoint in a form that other tools run, or fold a LangBridge with raw scores.

    python tools/export.py CHECKPOINT DIR
    python tools/export.py CHECKPOINT FILE.safetensors --prompt_embeds --image F --ask QUESTION

DIR becomes a LLaVA folder of transformers with its processor and chat template; with tiles it is a
LLaVA-NeXT folder. A LangBridge with raw scores is folded for it, and its words can no longer be
read there. FILE gets {"prompt_embeds": [T, D]}, what vLLM takes as prompt embeddings in place of
image and question. This works with any connector and an unchanged LLM: after stage 2 the folder
CHECKPOINT/llm, else the LLM itself. In Python:

    from tools.export import fold
    mlp_connector = fold(vlm.connector)
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common


def read_arguments():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("out", metavar="DIR_OR_FILE", help="what to write")
    add("--prompt_embeds", action="store_true", help="write the embeds of one prompt")
    add("--image", help="with --prompt_embeds: an image file")
    add("--ask", metavar="QUESTION", help="with --prompt_embeds: a question about it")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--overwrite", action="store_true", help="replace what is there")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args()
    if args.prompt_embeds != bool(args.ask) or args.image and not args.ask:
        parser.error("--prompt_embeds and --ask QUESTION belong together, and --image to them")
    return args


if __name__ == "__main__":                   # before the slow imports, so that --help is quick
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()

import torch
import transformers
from PIL import Image
from torch.nn import Parameter
from torch.nn.functional import pad

import checkpoint
import eval
from conversation import IMAGE, IMAGE_ID, encode_prompt
from model import LangBridge, MLPConnector
from support import pictures
from support.checks import refuse_files, refuse_inside
from support.templates import TEMPLATES, bos_of
from support.tensors import write_safetensors
from support.tower import side_of, tower_hidden

# The processor of transformers is tried with this question about a picture of this size.
QUESTION, BLANK = "What is in the image?", (8, 8)

# The messages of transformers have lists as contents. These lines make strings of them, with the
# image first, and the LLM's own template goes on from there. The library drops the newline after
# the last of them.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set flat.text = message.content if message.content is string else '' -%}
{%- if message.content is not string -%}
{%- for part in message.content if part.type == 'image' -%}
{%- set flat.text = flat.text + '<image>\\n' -%}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{%- set flat.text = flat.text + part.text -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message.role, 'content': flat.text | trim}] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""


@torch.no_grad()
def fold(connector):
    """Return an MLPConnector that computes the same function as a LangBridge with raw scores.

    Nothing but the GELU is non-linear there, so its last three products are one:
    W' = E^T W W2 and b' = E^T (W b2 + b). The products are made in float64 and returned in the
    connector's dtype. The result belongs to this LLM and its words can no longer be read.
    ValueError for another normalisation.
    """
    if connector.normalize != "none":
        raise ValueError(f"a connector with normalize={connector.normalize} is no two-layer MLP, "
                         "because its softmax does not fold")
    first, _, second = connector.mlp
    E = connector.vocab_embeds.double()                             # (K, D)
    W = connector.to_scores.weight.double() / connector.temperature             # (K, H)
    b = connector.to_scores.bias.double() / connector.temperature               # (K,)
    EW = E.T @ W                                                    # (D, K) x (K, H) -> (D, H)
    folded = MLPConnector(first.in_features, E.shape[1], first.out_features).to(first.weight)
    folded.mlp[0].load_state_dict(first.state_dict())
    folded.mlp[2].weight.copy_(EW @ second.weight.double())         # (D, H) x (H, H) -> (D, H)
    folded.mlp[2].bias.copy_(EW @ second.bias.double() + b @ E)
    return folded


def two_layers(connector):
    """Return (first, second), the connector as the two Linears of the library, [D, Dv] and [D, D].

    The library's hidden layer is as wide as the LLM. Rows of zeros fill up a narrower one: they
    reach the second layer as GELU(0) = 0. ValueError if the connector does not fit.
    """
    if isinstance(connector, LangBridge):
        connector = fold(connector)
    first, _, second = connector.mlp
    H, D = first.out_features, second.out_features
    if H > D:
        raise ValueError(f"the connector has H = {H}, more than the LLM's D = {D}, and a LLaVA of "
                         "transformers has H = D")
    first.weight = Parameter(pad(first.weight, (0, 0, 0, D - H)))
    first.bias = Parameter(pad(first.bias, (0, D - H)))
    second.weight = Parameter(pad(second.weight, (0, D - H)))
    return first, second


@torch.no_grad()
def rows_before_patches(vlm):
    """Return how many rows the vision tower gives before the patches: CLS and registers."""
    side = vlm.image_settings["size"]
    hidden = tower_hidden(vlm.vision_tower, torch.zeros(1, 3, side, side))[-1]
    return hidden.shape[1] - vlm.num_patches * vlm.config.pool ** 2


def chat_template(tokenizer):
    """Return a Jinja template that writes what conversation.encode writes.

    It takes contents that are strings or lists.
    """
    if tokenizer.chat_template:
        return FLATTEN + tokenizer.chat_template
    return FLATTEN + f"{{% set bos = {bos_of(tokenizer)!r} %}}" + TEMPLATES["chat"]


def to_llava(vlm):
    """Return (LlavaForConditionalGeneration, LlavaProcessor) with the parts of a VLM.

    With tiles these are the library's classes of LLaVA-NeXT. ValueError where the library's LLaVA
    computes something else than this VLM.
    """
    message = {"role": "user", "content": f"{IMAGE}\n{QUESTION}"}
    ids = encode_prompt([message], vlm.tokenizer, [vlm.num_tokens(BLANK)])
    tower, llm, settings = vlm.vision_tower, vlm.llm, vlm.image_settings
    size, patch_size = settings["size"], side_of(tower.config, "patch_size")
    first, second = two_layers(vlm.connector)
    resized = size != side_of(tower.config, "image_size") and tower.config.model_type != "dinov2"
    extra = rows_before_patches(vlm)
    reasons = [
        (vlm.softcap or llm.get_output_embeddings().bias is not None,
         f"{vlm.config.llm} caps its logits or adds a bias to them"),
        (resized, f"{vlm.config.vision_tower} takes pictures of {size} pixels here"),
        (extra > 1, f"{vlm.config.vision_tower} has {extra} tokens before the patches"),
        (vlm.config.pool > 1, f"{vlm.config.vision_tower} has its patches pooled")]
    for is_so, reason in reasons:
        if is_so:
            raise ValueError(f"{reason}, which a LLaVA of transformers does not know")
    strategy = "default" if extra else "full"               # "default" drops one token, CLS
    vlm.tokenizer.add_tokens([IMAGE], special_tokens=True)
    image_id = vlm.tokenizer.convert_tokens_to_ids(IMAGE)
    if image_id >= llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(image_id + 1, mean_resizing=False)
    # The row of "<image>" is of no training, and no answer may hold it.
    llm.generation_config.suppress_tokens = [image_id]
    name, tiles, pinpoints = "Llava", vlm.config.tiles, {}
    if tiles:
        name = "LlavaNext"                                  # it has (height, width)
        pinpoints = {"image_grid_pinpoints": [[height, width] for width, height in tiles]}
    config_class, llava_class, images_class, processor_class = (
        getattr(transformers, name + kind)
        for kind in ("Config", "ForConditionalGeneration", "ImageProcessorPil", "Processor"))
    config = config_class(
        vision_config=tower.config, text_config=llm.config, image_token_id=image_id,
        projector_hidden_act="gelu", vision_feature_layer=vlm.config.vision_layer,
        vision_feature_select_strategy=strategy, image_seq_length=vlm.num_patches,
        tie_word_embeddings=llm.config.tie_word_embeddings, **pinpoints)
    with torch.device("meta"):
        llava = llava_class(config)
    if type(llava.model.language_model) is not type(llm.get_decoder()):
        raise ValueError(f"{vlm.config.llm} is a {type(llm).__name__}, whose decoder is not the "
                         "one that a LLaVA of transformers would make")
    llava.model.vision_tower = tower
    llava.model.multi_modal_projector.linear_1 = first
    llava.model.multi_modal_projector.linear_2 = second
    llava.model.language_model = llm.get_decoder()
    llava.lm_head = llm.get_output_embeddings()
    if tiles:
        llava.model.image_newline = Parameter(vlm.image_newline.to(llm.dtype))
    llava.generation_config = llm.generation_config
    # do_pad centres the image on a square of the mean colour, as evaluation does here. For
    # LLaVA-NeXT it adds empty tiles where the images of a batch have different numbers of tiles.
    images = images_class(
        do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=list(settings["mean"]), image_std=list(settings["std"]), **pinpoints)
    processor = processor_class(
        images, vlm.tokenizer, patch_size=patch_size, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra, chat_template=chat_template(vlm.tokenizer))
    check_prompt(processor, ids)
    return llava, processor


def check_prompt(processor, ids):
    """Raise ValueError if the processor writes other ids for the QUESTION about a picture.

    ids: those of this project, with IMAGE_ID once for each patch. The picture is of the size BLANK.
    """
    content = [{"type": "image", "image": Image.new("RGB", BLANK)},
               {"type": "text", "text": QUESTION}]
    theirs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                           add_generation_prompt=True, return_dict=True)
    theirs = [IMAGE_ID if i == processor.image_token_id else i
              for i in theirs["input_ids"][0]]
    if theirs != ids:
        at = len(os.path.commonprefix([theirs, ids]))
        raise ValueError(f"the processor of transformers writes {theirs[at:at + 3]} where this "
                         f"project writes {ids[at:at + 3]}, so the answers would differ")


def main(args):
    refuse_files([args.out], args.overwrite)
    refuse_inside(args.out, checkpoint=args.checkpoint)
    vlm = checkpoint.load(args.checkpoint, dtype=getattr(torch, args.dtype))
    if not args.prompt_embeds:
        try:
            llava, processor = to_llava(vlm)
        except ValueError as error:
            raise ValueError(f"{error}; --prompt_embeds works with every checkpoint") from None
        llava.save_pretrained(args.out)
        processor.save_pretrained(args.out)
        print(f"wrote {args.out}: {type(llava).__name__}.from_pretrained reads it")
        return
    ids = eval.prompt_ids(vlm, {"image": args.image, "text": args.ask})
    pixel_values = picture_sizes = None
    if args.image:
        image = pictures.open_image(args.image)
        picture_sizes = [image.size]
        pixel_values = pictures.tile_pixels(image, **vlm.image_settings, mode="pad",
                                            tiles=vlm.config.tiles)
    with torch.no_grad():
        embeds = vlm.splice(torch.tensor([ids]), pixel_values, picture_sizes=picture_sizes)[0]
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    write_safetensors({"prompt_embeds": embeds}, args.out)              # (T, D)
    print(f"wrote {args.out}: prompt_embeds {tuple(embeds.shape)} for {vlm.config.llm}")


if __name__ == "__main__":
    common.run_script(main, ARGS)
