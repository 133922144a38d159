# Photographs, stage 2: questions with short answers. Connector and LLM train. results/questions.py
# writes train.json from a file of records in LLaVA's format, and measures the result.
# results/photos.sh first lets the connector learn the words of the answers (answers.json).
stage = "sft"
out = "out/photos/questions"
init = "out/photos/question-words"
data = "data/questions/train.json"
images = "data/questions/images"
image_mode = "pad"
template = "chat"
group = True
global_batch = 4                        # 184 steps: 734 photographs with about nine questions each
batch_size = 4
connector_lr = 2e-4
llm_lr = 1e-4
warmup = 0.1
dtype = "auto"
attention = "eager"
workers = 0
log_every = 5
save_every = 20
