# Photographs, stage 2: questions with short answers. Connector and LLM train. results/questions.py
# writes train.json from a file of records in LLaVA's format, and measures the result.
stage = "sft"
out = "out/photos/questions"
init = "out/photos/pretrain"
data = "data/questions/train.json"
images = "data/questions/images"
image_mode = "pad"
template = "chat"
group = True
global_batch = 4
batch_size = 4
max_steps = 60                          # 240 photographs with about nine questions each
connector_lr = 2e-4
llm_lr = 1e-4
warmup = 0.1
dtype = "float32"
workers = 0
log_every = 5
save_every = 20
