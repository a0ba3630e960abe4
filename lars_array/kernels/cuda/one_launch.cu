// A LARS step in one launch, for steps that are taken whatever their sums are. Appended to lars.cu.
//
// Blocks take tasks from a counter, in the order in which `one_launch.py` has planned them: the sums of a piece, or its
// update. The block that measures the last piece of a unit, which is one layer or several small ones, computes the
// unit's coefficients. An update waits for these.
//
// `one_launch.py` puts the structures before this text:
//
// Task: a piece, the complement of its number where it is updated, and its unit.
// Unit: the entries of Model::arrays that it has, and how many pieces these have.
// Plan: both; and counters, which are 0 between launches. `measured` counts, for each unit, the pieces that are measured
// and one more when its coefficients are there; `next` the tasks that were taken; `ended` the blocks that are done.
//
// No grid is too small or too large. Suppose that some task is never finished, and take the first of them. It was
// taken, since blocks take all tasks before it and, once these are finished, return for more; by a block that is
// running, since a block runs until it ends. Sums and coefficients wait for nothing, so it is an update. It waits only
// for sums of its unit, which stand before it, and for the coefficients, which the block that has finished the last of
// these sums computes before it takes another task. All of them are finished, so the update is too.
//
// Coefficients are computed from the same partial sums in the same order as by three launches: bits are equal.

#ifdef __CUDACC__
// The value of a counter that other blocks change.
__device__ inline int peek(const int* counter) { return *(const volatile int*)counter; }
#endif

// Add 1, by the first thread of a block. A block that reads the new value also sees all earlier writes.
__device__ inline int count_on(int* counter) {
    __threadfence();
    int before = atomicAdd(counter, 1);
    __threadfence();
    return before;
}

__device__ inline void wait_for(const int* counter, int number) {
    while (peek(counter) != number) {}
    __threadfence();
}

template <class P, class G> __device__ inline void measure_piece(const Model& m, const Plan& plan, const Task& task) {
    __shared__ bool is_last;
    const Unit& unit = plan.units[task.unit];
    Sums all = sums_of<P, G>(m, task.piece);
    if (threadIdx.x == 0) {
        m.partial[task.piece] = all;
        is_last = count_on(plan.measured + task.unit) == unit.pieces - 1;
    }
    __syncthreads();
    if (!is_last) return;
    const int COLUMNS = ROWS / 4;  // fewer than a block of `coefficients` has, for the sake of shared memory
    for (int first = unit.first; first < unit.end; first += COLUMNS) {
        coefficients_of<COLUMNS>(m, first, unit.end);
        __syncthreads();
    }
    if (threadIdx.x == 0) count_on(plan.measured + task.unit);
}

// A whole step: core.sums, core.coefficients, core.apply, and what the host keeps of it, by any number of blocks.
template <class P, class G> __device__ inline void step(const Model& m, const Plan& plan) {
    __shared__ int turn;
    __shared__ bool is_last;
    bool taken = !found_inf(m);
    while (true) {
        if (threadIdx.x == 0) turn = atomicAdd(plan.next, 1);
        __syncthreads();
        if (turn >= plan.task_count) break;
        Task task = plan.tasks[turn];
        if (task.piece >= 0) {
            measure_piece<P, G>(m, plan, task);
        } else if (taken) {
            if (threadIdx.x == 0) wait_for(plan.measured + task.unit, plan.units[task.unit].pieces + 1);
            __syncthreads();
            update_piece<true, P, G>(m, ~task.piece);
        }
        __syncthreads();  // before `turn` is overwritten
    }
    if (threadIdx.x == 0) is_last = count_on(plan.ended) == (int)gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int k = threadIdx.x; k < plan.unit_count; k += THREADS) plan.measured[k] = 0;
    if (threadIdx.x == 0) {
        *plan.next = 0;
        atomicExch(plan.ended, 0);
        *m.prevented = 0;  // of an earlier step that was not taken
        *m.offender = 2 * m.row_count;
    }
    commit(m, taken);  // now that all coefficients are computed, from what it overwrites
}
