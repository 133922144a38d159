# Stage 1 of the paper: a LangBridge on Qwen2-0.5B-Instruct. --llm=NAME takes another LLM.
# Only what differs from the defaults of train.py stands here. Values without a source are those of
# the released scripts (CurryX-001/LangBridge 4033063).
stage = "pretrain"
out = "out/paper/pretrain"
llm = "Qwen/Qwen2-0.5B-Instruct"
words = "words.json"                                    # 19,200 words; others: --size of vocab.py
normalize = "none"                                      # the code; the text says "softmax"
connector_lr = 2e-5
vision_tower = "openai/clip-vit-large-patch14-336"      # 336 pixels, 576 patches
data = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"    # 558,128 captions
images = "data/LLaVA-Pretrain/images"
checkpointing = True                                    # LLaVA-1.5
# Defaults of train.py that LLaVA-1.5 uses, too: image_mode crop, template plain, max_length 2048,
# global_batch 256 (8 GPUs x 32, 2,181 steps), 1 epoch, AdamW without decay, warmup 0.03, clip 1.0.
