// The schemas of torch_gru_fuse's ops, for programs without Python. See README.md beside this file.
//
// torch_gru_fuse/ops/schemas.py states the same; tests/test_csrc_stub.py fails where the two differ.

#include <torch/library.h>

TORCH_LIBRARY(torch_gru_fuse, m) {
  // For users: the arguments of torch.gru, of its overload for packed data and of torch.gru_cell.
  m.def(
      "gru(Tensor input, Tensor hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
      "bool bidirectional, bool batch_first, *, bool recompute=False, Tensor? resets=None, Tensor? keep=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "gru_cell(Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, Tensor? b_hh=None) -> Tensor");

  m.def(
      "gru_packed(Tensor data, Tensor batch_sizes, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
      "float dropout, bool train, bool bidirectional, *, bool recompute=False) -> (Tensor, Tensor)");

  // Two calls of gru at once.
  m.def(
      "gru_pair(Tensor[] inputs, Tensor hx, Tensor[] params, bool has_biases, bool[] reverse, bool batch_first, *, "
      "bool recompute=False) -> (Tensor, Tensor, Tensor)");

  // What a compiled graph holds.
  m.def(
      "gru_forward(Tensor input, Tensor hx, Tensor[] params, bool has_biases, int num_layers, bool bidirectional, "
      "Tensor? dropout_masks, bool save, Tensor? keep=None, *, bool recompute=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, Tensor[] params, bool has_biases, "
      "int num_layers, bool bidirectional, Tensor? dropout_masks, Tensor output, Tensor reserve, bool[] needs, "
      "Tensor? keep=None) -> Tensor[]");
  m.def(
      "gru_pair_forward(Tensor[] inputs, Tensor hx, Tensor[] params, bool has_biases, bool[] reverse, bool save, *, "
      "bool recompute=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gru_pair_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor[] inputs, Tensor hx, Tensor[] params, "
      "bool has_biases, bool[] reverse, Tensor output, Tensor reserve, bool[] needs) -> Tensor[]");
  m.def(
      "gru_packed_forward(Tensor data, Tensor batch_sizes, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
      "bool bidirectional, Tensor? dropout_masks, bool save, *, bool recompute=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gru_packed_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor data, Tensor batch_sizes, Tensor hx, "
      "Tensor[] params, bool has_biases, int num_layers, bool bidirectional, Tensor? dropout_masks, Tensor output, "
      "Tensor reserve, bool[] needs) -> Tensor[]");
  m.def("lengths_tensor(SymInt[] lengths) -> Tensor");
  m.def("pack_padded(Tensor input, Tensor lengths, bool batch_first) -> (Tensor, Tensor)");
  m.def(
      "pad_packed(Tensor data, Tensor batch_sizes, bool batch_first, Scalar padding_value, SymInt? total_length, "
      "SymInt? batch) -> (Tensor, Tensor)");
  m.def("unpad(Tensor padded, Tensor batch_sizes, bool batch_first, SymInt rows) -> Tensor");
  m.def("packed_zeros(Tensor data, Tensor batch_sizes, int states, int hidden) -> Tensor");
  m.def(
      "gru_cell_forward(Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save) "
      "-> (Tensor, Tensor)");
  m.def(
      "gru_cell_backward(Tensor grad_h, Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor gates, bool[] needs) -> Tensor[]");
}
