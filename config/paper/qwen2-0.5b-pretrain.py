# Stage 1 of the paper: a LangBridge on Qwen2-0.5B. Values without a name: the released scripts (CurryX-001/LangBridge 4033063).
stage = "pretrain"
out = "out/paper/qwen2-0.5b-pretrain"
llm = "Qwen/Qwen2-0.5B-Instruct"
words = "words.json"                                    # 19,200 words, see the README; or num_words = 25600, 32000
hidden = 5120                                           # released scripts of LangBridge
normalize = "none"                                      # the released code; the paper's text says a distribution ("softmax")
connector_lr = 2e-5                                     # released scripts, stage 1 with the vocabulary connector
vision_tower = "openai/clip-vit-large-patch14-336"      # 336 px, 576 patches; layer -2 without CLS is the default
data = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"    # 558,128 captions
images = "data/LLaVA-Pretrain/images"
image_mode = "crop"                                     # LLaVA-1.5: stage 1 crops, stage 2 pads
template = "plain"                                      # LLaVA-1.5, stage 1: image, caption, newline
max_length = 2048                                       # LLaVA-1.5
global_batch = 256                                      # LLaVA-1.5, stage 1: 8 GPUs x 32; 2,181 steps
batch_size = 32
epochs = 1                                              # LLaVA-1.5, both stages
beta1, beta2, weight_decay = 0.9, 0.999, 0.0             # LLaVA-1.5: AdamW, no decay
warmup = 0.03                                           # LLaVA-1.5: cosine to 0
clip = 1.0                                              # LangBridge's DeepSpeed files
checkpointing = True                                    # LLaVA-1.5
seed = 42                                               # LLaVA-1.5
