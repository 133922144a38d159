# A short stage 2 on Gemma-3-270M after `transfer.py out/small/pretrain google/gemma-3-270m --out out/small/gemma`.
stage = "sft"
out = "out/small/gemma-sft"
init = "out/small/gemma"
data = "data/small/captions_train.json"
images = "data/small/images"
image_mode = "pad"
template = "prompted"
global_batch = 8
batch_size = 8
max_steps = 60
connector_lr = 5e-4
llm_lr = 1e-5                           # half of LLaVA-1.5: 834 captions are few
save_every = 20
workers = 1
