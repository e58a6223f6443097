"""The trained model as files that other programs serve, without this project.

padded        the encoder on padded histories, for torch.export and ONNX
exporters     model.pt2, model.onnx
vectors       item_vectors.npy, items.json
folder        all of them
recommender   copied into the folder: best items with numpy and onnxruntime alone
Imports: ``model.bert4rec`` and rooms before it; ``recommender`` imports nothing of the project.
"""
