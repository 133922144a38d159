# The baseline of the paper's tables: stage 2 of an MLP on Qwen2.5-14B-Instruct.
stage = "sft"
out = "out/paper/qwen2.5-14b-mlp-sft"
init = "out/paper/qwen2.5-14b-mlp-pretrain"
connector_lr = 2e-5                                     # LLaVA-1.5, stage 2
llm_lr = 2e-5
data = "data/llava_v1_5_mix665k.json"                   # 665,298 records; the paper's filter of it is not published
images = "data"
image_mode = "pad"                                      # LLaVA-1.5, stage 2
template = "chat"                                       # the LLM's own; the released code has qwen_2 and llama3 strings
max_length = 2048                                       # LLaVA-1.5
group = True                                            # LLaVA-1.5: group_by_modality_length
global_batch = 128                                      # LLaVA-1.5, stage 2: 8 GPUs x 8 x 2; 5,198 steps
batch_size = 8
epochs = 1                                              # LLaVA-1.5, both stages
beta1, beta2, weight_decay = 0.9, 0.999, 0.0             # LLaVA-1.5: AdamW, no decay
warmup = 0.03                                           # LLaVA-1.5: cosine to 0
clip = 1.0                                              # LangBridge's DeepSpeed files
shard = True                                            # FSDP2: the LLM in float32 with AdamW fits no GPU whole
checkpointing = True                                    # LLaVA-1.5
seed = 42                                               # LLaVA-1.5
# for --dry_run before init is there
llm = "Qwen/Qwen2.5-14B-Instruct"
vision_tower = "openai/clip-vit-large-patch14-336"
connector = "mlp"
hidden = 0
