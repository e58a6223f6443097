"""The trained model in forms that other programs serve.

padded        the encoder on padded histories, for torch.export and ONNX
programs      model.pt2, model.onnx
vectors       item_vectors.npy, items.npz
recommender   copied into the folder: top-K with numpy and onnxruntime alone
Imports: ``model.bert4rec`` and rooms before it; ``recommender`` imports nothing of the project.
"""
