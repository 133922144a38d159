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
max_steps = 80
connector_lr = 1e-3
llm_lr = 2e-6                           # a tenth of LLaVA-1.5: at 1e-5 and 2e-5 the LLM learns 834 captions by heart, blind
save_every = 40
workers = 1
