// The row kernel of the Kullback-Leibler divergences.
#include "rows.cuh"

namespace distill_kernels::cuda {

template void launch_rows<forward_kl>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<reverse_kl>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<symmetric_kl>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);

}  // namespace distill_kernels::cuda
