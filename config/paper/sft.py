# Stage 2 of the paper, with a LangBridge. The LLM is that of --init:
#   python transfer.py out/paper/pretrain Qwen/Qwen2-7B-Instruct --out out/paper/moved
#   torchrun --nproc_per_node=8 train.py config/paper/sft.py --init=out/paper/moved
# --dry_run works with --llm=NAME before there is a checkpoint.
stage = "sft"
out = "out/paper/sft"
connector_lr = 2e-5                                     # LLaVA-1.5: one rate for all that trains
llm_lr = 2e-5
# 665,298 records; the paper's filter is not published.
data = "data/llava_v1_5_mix665k.json"
images = "data"
image_mode = "pad"                                      # LLaVA-1.5: stage 1 crops, stage 2 pads
template = "chat"                                       # the LLM's own
group = True                                            # LLaVA-1.5: group_by_modality_length
global_batch = 128                                      # LLaVA-1.5: 8 GPUs x 8 x 2; 5,198 steps
batch_size = 8
shard = True                                            # FSDP2: an LLM in float32 with AdamW
checkpointing = True                                    # LLaVA-1.5
# For --dry_run without a checkpoint:
vision_tower = "openai/clip-vit-large-patch14-336"
llm = "Qwen/Qwen2-7B-Instruct"
normalize = "none"
