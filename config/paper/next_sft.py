# Stage 2 of the paper's LLaVA-NeXT experiments: a LangBridge that was trained on Qwen2-0.5B moves
# to Qwen2-7B, and tower, connector and LLM train on tiles. Stage 1 is pretrain.py: it has no tiles.
#   python transfer.py out/paper/pretrain Qwen/Qwen2-7B-Instruct --out out/paper/moved
#   torchrun --nproc_per_node=8 train.py config/paper/next_sft.py --init=out/paper/moved
# --dry_run works before there is a checkpoint. Values without a source are those of the released
# scripts (CurryX-001/LangBridge 4033063, LLaVA-NeXT/), which cannot start as they were released.
stage = "sft_tower"
out = "out/paper/next_sft"
connector_lr = 1e-5
llm_lr = 1e-5                                           # image_newline has this rate, too
vision_tower_lr = 2e-6
tiles = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # (width, height): "anyres"
# The data were never published. The authors report about 760,000 to 790,000 records.
data = "data/llava_1_6.json"
images = "data"
template = "chat"                                       # the release: qwen_1_5
max_length = 32768                                      # Qwen2-7B has as many positions
group = True                                            # group_by_modality_length
batch_size = 4                                          # the release, on an unknown number of GPUs
global_batch = 128                                      # not published; 128 is LLaVA-1.5's
shard = True                                            # FSDP2: an LLM in float32 with AdamW
checkpointing = True                                    # LLaVA-1.5
# Defaults of train.py that the scripts have, too: 1 epoch, AdamW without decay, warmup 0.03, clip
# 1.0. image_mode does not matter with tiles.
# For --dry_run without a checkpoint:
vision_tower = "openai/clip-vit-large-patch14-336"
llm = "Qwen/Qwen2-7B-Instruct"
words = "words.json"
normalize = "none"
