// A LARS step for all layers of a model: `sums`, `coefficients` and `apply`, one launch each.
//
// The update is core.difference; the coefficients come from a rule's tape, see kernels/tape.py. Formulas that are
// repeated here name their place in core.py, and tests compare the two.
//
// `source.py` puts constants, enums and the structures Array, Row, Group, Piece, Model and Pointers before this text.
// No header is included. Compiled with --fmad=false, so that each operation is rounded as NumPy rounds it.
//
// Sums are added in an order that depends on sizes alone. Atomics collect flags only, never numbers.

// ------------------------------------------------------------------------------------------------------ element types

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct Computed { typedef float type; };
template <> struct Computed<double> { typedef double type; };

union Bits { float number; unsigned bits; };

#ifdef __CUDACC__
__device__ inline float float16_to_float(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}

__device__ inline unsigned short float_to_float16(float number) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
#endif

__device__ inline double wide(double x) { return x; }
__device__ inline float wide(float x) { return x; }
__device__ inline float wide(float16 x) { return float16_to_float(x.bits); }
__device__ inline float wide(bfloat16 x) {
    Bits bits;
    bits.bits = (unsigned)x.bits << 16;
    return bits.number;
}

__device__ inline void store(double& place, double x) { place = x; }
__device__ inline void store(float& place, float x) { place = x; }
__device__ inline void store(float16& place, float x) { place.bits = float_to_float16(x); }
__device__ inline void store(bfloat16& place, float x) {  // to nearest, ties to even; sm_70 has no instruction for it
    Bits bits = {x};
    unsigned rounded = bits.bits + 0x7fffu + (bits.bits >> 16 & 1u);
    place.bits = (unsigned short)(x == x ? rounded >> 16 : bits.bits >> 16 | 0x40u);
}

// ------------------------------------------------------------------------------------------------------------- memory

const int WIDTH = 4;  // elements that a thread takes at once

template <class T> struct alignas(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Pack { T at[WIDTH]; };

template <class T> __device__ inline bool is_aligned(const T* x) { return (u64)x % alignof(Pack<T>) == 0; }  // or null

// An array that starts at an odd place is read element by element, by the same thread: the sums are the same.
template <class T> __device__ inline Pack<T> load(const T* x, bool aligned) {
    if (aligned) return *reinterpret_cast<const Pack<T>*>(x);
    Pack<T> pack;
    for (int i = 0; i < WIDTH; ++i) pack.at[i] = x[i];
    return pack;
}

template <class T> __device__ inline void save(T* x, const Pack<T>& pack, bool aligned) {
    if (aligned) *reinterpret_cast<Pack<T>*>(x) = pack;
    else for (int i = 0; i < WIDTH; ++i) x[i] = pack.at[i];
}

// The same of memory that is not needed again soon: the cache gives it up before all else.
template <class T> __device__ inline Pack<T> load_last(const T* x, bool aligned) {
    if (!aligned) return load(x, false);
    Pack<T> pack;
    if constexpr (sizeof(pack) == sizeof(uint2)) {
        reinterpret_cast<uint2&>(pack) = __ldcs(reinterpret_cast<const uint2*>(x));
    } else {
        for (unsigned i = 0; i < sizeof(pack) / sizeof(uint4); ++i)
            reinterpret_cast<uint4*>(&pack)[i] = __ldcs(reinterpret_cast<const uint4*>(x) + i);
    }
    return pack;
}

template <class T> __device__ inline void save_last(T* x, const Pack<T>& pack, bool aligned) {
    if (!aligned) return save(x, pack, false);
    if constexpr (sizeof(pack) == sizeof(uint2)) {
        __stcs(reinterpret_cast<uint2*>(x), reinterpret_cast<const uint2&>(pack));
    } else {
        for (unsigned i = 0; i < sizeof(pack) / sizeof(uint4); ++i)
            __stcs(reinterpret_cast<uint4*>(x) + i, reinterpret_cast<const uint4*>(&pack)[i]);
    }
}

// The part of an array that a block works on.
struct Part {
    const Array& array;
    u64 g;
    i64 begin, end, whole;  // `whole` is where the last full pack ends

    __device__ Part(const Model& m, int piece) : array(m.arrays[m.pieces[piece].array]) {
        g = m.grads[m.pieces[piece].array];
        begin = m.pieces[piece].index * array.piece;
        end = array.size - begin < array.piece ? array.size : begin + array.piece;
        whole = end - (end - begin) % WIDTH;
    }
};

// Write pointers that are arguments of the launch: the host does not wait, and a CUDA graph keeps them.
extern "C" __global__ void __launch_bounds__(THREADS) write_pointers(u64* table, Pointers pointers) {
    for (int i = threadIdx.x; i < pointers.count; i += THREADS) table[pointers.first + i] = pointers.values[i];
}

// ----------------------------------------------------------------------------------- gradient factor and third operand

__device__ inline const double* hyper_of(const Model& m, const Row& row) { return m.hyper + (i64)row.group * FIELDS; }

__device__ inline bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// core.gradient_factor
__device__ inline double gradient_factor(const double* hyper, const double* norm) {
    double gamma = hyper[MAXIMIZE] != 0 ? -hyper[RESCALE_GRAD] : hyper[RESCALE_GRAD];
    if (norm == nullptr) return gamma;
    bool clipped = *norm > hyper[MAX_GRAD_NORM] || (*norm != *norm && is_finite(hyper[MAX_GRAD_NORM]));
    return gamma * (clipped ? hyper[MAX_GRAD_NORM] / *norm : 1.0);
}

// core.with_max_ratio
__device__ inline double max_ratio_root(const double* hyper, double limit) {
    double factors[] = {hyper[LR], hyper[WEIGHT_DECAY], hyper[MOMENTUM], fabs(1 - hyper[DAMPENING]), hyper[RESCALE_GRAD]};
    double ratio = limit;
    for (double x : factors) ratio /= x > 1 ? x : 1.0;
    return sqrt(hyper[TRUST_COEFFICIENT] < ratio ? ratio : limit);
}

// core._operand and core.update_weights: the factors of g, p and v in the third sum.
struct Weights { double gamma, w, h; };

__device__ inline Weights operand(const Model& m, int index, const double* norm) {
    const Row& row = m.rows[index];
    const double* hyper = hyper_of(m, row);
    Weights weights = {gradient_factor(hyper, norm), 0.0, 0.0};
    int norm_of = m.groups[row.group].norm_of;
    if (norm_of != GRADIENT) weights.w = hyper[WEIGHT_DECAY];
    if (norm_of != UPDATE) return weights;
    double momentum = hyper[MOMENTUM];
    double undamped = m.first[row.param] ? 1.0 : 1.0 - hyper[DAMPENING];
    bool direct = hyper[NESTEROV] != 0 || momentum == 0;
    double a = direct ? 1.0 + momentum * undamped : undamped;
    return Weights{weights.gamma * a, weights.w * a, direct ? momentum * momentum : momentum};
}

// --------------------------------------------------------------------------------------------------------------- sums

struct Sums { double p, g, third; };

__device__ inline void operator+=(Sums& sums, const Sums& more) {
    sums.p += more.p;
    sums.g += more.g;
    sums.third += more.third;
}

// Add up the sums of a block's threads, in a fixed order. The first thread gets the total.
__device__ inline Sums total(Sums mine) {
    __shared__ Sums all[THREADS];
    all[threadIdx.x] = mine;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < step) all[threadIdx.x] += all[threadIdx.x + step];
    }
    return all[threadIdx.x];
}

template <bool THIRD>
__device__ inline void add(Sums& sums, double p, double g, double v, const Weights& weights) {
    sums.p = fma(p, p, sums.p);
    sums.g = fma(g, g, sums.g);
    if (THIRD) {
        double d = weights.gamma * g + weights.w * p + weights.h * v;
        sums.third = fma(d, d, sums.third);
    }
}

template <class P, class G, bool THIRD>
__device__ inline Sums measure(const Part& part, const P* p, const G* g, const typename Computed<P>::type* v,
                               const Weights& weights) {
    Sums sums = {0, 0, 0};
    bool aligned = is_aligned(p) && is_aligned(g) && is_aligned(v);
#pragma unroll 4
    for (i64 k = part.begin + WIDTH * (i64)threadIdx.x; k < part.whole; k += WIDTH * THREADS) {
        Pack<P> ps = load(p + k, aligned);
        Pack<G> gs = load(g + k, aligned);
        Pack<typename Computed<P>::type> vs = {};
        if (THIRD && v != nullptr) vs = load(v + k, aligned);
        for (int i = 0; i < WIDTH; ++i) add<THIRD>(sums, wide(ps.at[i]), wide(gs.at[i]), vs.at[i], weights);
    }
    i64 k = part.whole + threadIdx.x;
    if (k < part.end) add<THIRD>(sums, wide(p[k]), wide(g[k]), THIRD && v != nullptr ? v[k] : 0.0, weights);
    return sums;
}

template <class P, class G> __device__ inline Sums measure(const Model& m, const Part& part, const P* p) {
    typedef typename Computed<P>::type V;
    const G* g = reinterpret_cast<const G*>(part.g);
    if (m.weights == nullptr && m.third == 0) return measure<P, G, false>(part, p, g, nullptr, Weights());
    int row = part.array.row;
    const double* given = m.weights;
    Weights weights = given != nullptr ? Weights{given[3 * row], given[3 * row + 1], given[3 * row + 2]}
                                       : operand(m, row, m.third_is_clipped ? m.norm : nullptr);
    const V* v = weights.h == 0 ? nullptr : reinterpret_cast<const V*>(part.array.v);
    return measure<P, G, true>(part, p, g, v, weights);
}

// The sums of a piece, by a block. The first thread gets them.
template <class P, class G> __device__ inline Sums sums_of(const Model& m, int piece) {
    typedef typename Computed<P>::type T;
    Part part(m, piece);
    const T* master = reinterpret_cast<const T*>(part.array.master);
    const P* p = reinterpret_cast<const P*>(part.array.p);
    return total(master != nullptr ? measure<T, G>(m, part, master) : measure<P, G>(m, part, p));
}

// First stage, core.sums: of each piece from `first` on, one a block.
template <class P, class G> __device__ inline void sums(const Model& m, int first) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {  // `apply` of the step before is done
        *m.prevented = 0;
        *m.offender = 2 * m.row_count;
    }
    if (first + (int)blockIdx.x >= m.piece_count) return;  // a model of empty arrays
    Sums all = sums_of<P, G>(m, first + (int)blockIdx.x);
    if (threadIdx.x == 0) m.partial[first + blockIdx.x] = all;
}

// The norm of all gradients together, in core.gradient_factor: one block.
extern "C" __global__ void __launch_bounds__(THREADS) gradient_norm(Model m) {
    Sums mine = {0, 0, 0};
    for (int k = threadIdx.x; k < m.piece_count; k += THREADS) {
        double scale = hyper_of(m, m.rows[m.arrays[m.pieces[k].array].row])[RESCALE_GRAD];
        mine.g += scale * scale * m.partial[k].g;
    }
    Sums all = total(mine);
    if (threadIdx.x == 0) *m.norm = sqrt(all.g);
}

// ------------------------------------------------------------------------------------------------------- coefficients

// Run a tape, see kernels/tape.py. Each thread has a column of registers; results go to those from `next` on.
template <int COLUMNS>
__device__ inline void run_tape(const Group& group, const int* operations, double (*registers)[COLUMNS], int column,
                                int next) {
    for (int k = group.first_operation; k < group.last_operation; ++k, ++next) {
        const int* operation = operations + 4 * (i64)k;
        double a = registers[operation[1]][column], b = registers[operation[2]][column], result;
        switch (operation[0]) {
            case ADD: result = a + b; break;
            case SUBTRACT: result = a - b; break;
            case MULTIPLY: result = a * b; break;
            case DIVIDE: result = a / b; break;
            case LESS: result = a < b ? 1.0 : 0.0; break;
            case LESS_EQUAL: result = a <= b ? 1.0 : 0.0; break;
            case EQUAL: result = a == b ? 1.0 : 0.0; break;
            case WHERE: result = a != 0 ? b : registers[operation[3]][column]; break;
            case SQRT: result = sqrt(a); break;
            default: result = fabs(a); break;
        }
        registers[next][column] = result;
    }
}

// core.coefficients for one layer, and nonfinite.finite of the result.
template <int COLUMNS>
__device__ inline void evaluate(const Model& m, int index, const Sums& s, double (*registers)[COLUMNS], int column) {
    const Row& row = m.rows[index];
    const Group& group = m.groups[row.group];
    const double* hyper = hyper_of(m, row);
    double gamma = gradient_factor(hyper, m.clips ? m.norm : nullptr);
    m.S[index] = s;
    m.gamma[index] = gamma;
    registers[P_SQUARES][column] = s.p;
    registers[G_SQUARES][column] = s.g;
    registers[THIRD_SUM][column] = s.third;
    registers[GAMMA][column] = gamma;
    for (int i = 0; i < FIELDS; ++i) registers[HYPER + i][column] = hyper[i];
    registers[FIRST][column] = m.first[row.param] ? 1.0 : 0.0;
    registers[PREVIOUS_LR][column] = m.previous_lr[row.param];
    registers[MAX_RATIO_ROOT][column] = max_ratio_root(hyper, row.limit);
    int next = INPUTS;
    for (int k = group.first_constant; k < group.last_constant; ++k) registers[next++][column] = m.constants[k];
    run_tape(group, m.operations, registers, column, next);
    bool holds = is_finite(s.p) && is_finite(s.g), ok = holds && is_finite(s.third) && s.g <= row.square_limit;
    for (int i = 0; i < 6; ++i) {
        double c = registers[group.outputs[i]][column];
        m.C[6 * (i64)index + i] = c;
        ok = ok && fabs(c) <= row.limit;
    }
    if (!ok && group.policy != PROPAGATE) atomicMax(m.prevented, 1);
    if (!ok && group.policy == RAISE) atomicMin(m.offender, holds ? m.row_count + index : index);
}

// Coefficients of the rows of at most COLUMNS arrays from `first` on, all before `end`, by a block.
template <int COLUMNS> __device__ inline void coefficients_of(const Model& m, int first, int end) {
    const int LANES = THREADS / ROWS;  // threads that add up the pieces of a layer
    __shared__ Sums part[COLUMNS][LANES];
    __shared__ double registers[SLOTS][COLUMNS];
    int mine = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (mine < COLUMNS) {
        Sums s = {0, 0, 0};
        if (first + mine < end) {
            const Row& row = m.rows[m.arrays[first + mine].row];
            for (int k = lane; k < row.pieces; k += LANES) s += m.partial[row.first_piece + k];
        }
        part[mine][lane] = s;
    }
    __syncthreads();
    if ((int)threadIdx.x >= COLUMNS || first + (int)threadIdx.x >= end) return;
    Sums s = part[threadIdx.x][0];
    for (int k = 1; k < LANES; ++k) s += part[threadIdx.x][k];
    if (m.third == 0 && m.weights == nullptr) s.third = s.g;  // as in core.sums
    int index = m.arrays[first + threadIdx.x].row;
    if (m.decides) evaluate<COLUMNS>(m, index, s, registers, threadIdx.x);
    else m.S[index] = s;
}

// Second stage: each block has ROWS arrays.
extern "C" __global__ void __launch_bounds__(THREADS) coefficients(Model m) {
    coefficients_of<ROWS>(m, (int)blockIdx.x * ROWS, m.row_count);
}

// -------------------------------------------------------------------------------------------------------------- apply

__device__ inline bool found_inf(const Model& m) { return m.found_inf != nullptr && *m.found_inf != 0; }

__device__ inline bool is_taken(const Model& m) {
    if (m.taken != nullptr) return *m.taken;
    return !m.decides || (*m.prevented == 0 && !found_inf(m));
}

// p - core.difference and, without a buffer, p - core.difference_without_buffer.
template <class T> struct AffineMap {
    T m, alpha, beta, kappa, lam, mu;

    __device__ AffineMap(const double* c)
        : m((T)c[0]), alpha((T)c[1]), beta((T)c[2]), kappa((T)c[3]), lam((T)c[4]), mu((T)c[5]) {}

    __device__ T operator()(T p, T g, T& v) const {
        v = m * v + alpha * g + beta * p;
        return p - (kappa * v + lam * g + mu * p);
    }

    __device__ T operator()(T p, T g) const { return p - ((lam + kappa * alpha) * g + (mu + kappa * beta) * p); }
};

// Update `p`, a parameter or its master copy; `rounded`, the parameter of a master copy, gets its value, or is null.
// LAST: the cache is wanted for other memory.
template <bool LAST, class T, class P, class G, class R>
__device__ inline void update(const Part& part, P* p, const G* g, T* v, R* rounded, const AffineMap<T>& map) {
    bool aligned = is_aligned(p) && is_aligned(g) && is_aligned(v) && is_aligned(rounded);
#pragma unroll 2
    for (i64 k = part.begin + WIDTH * (i64)threadIdx.x; k < part.whole; k += WIDTH * THREADS) {
        Pack<P> ps = LAST ? load_last(p + k, aligned) : load(p + k, aligned);
        Pack<G> gs = LAST ? load_last(g + k, aligned) : load(g + k, aligned);
        Pack<T> vs = {};
        Pack<R> copies;
        if (v != nullptr) vs = LAST ? load_last(v + k, aligned) : load(v + k, aligned);
        for (int i = 0; i < WIDTH; ++i) {
            T x = (T)wide(ps.at[i]), slope = (T)wide(gs.at[i]);
            x = v != nullptr ? map(x, slope, vs.at[i]) : map(x, slope);
            store(ps.at[i], x);
            store(copies.at[i], x);
        }
        if (LAST) {
            save_last(p + k, ps, aligned);
            if (v != nullptr) save_last(v + k, vs, aligned);
            if (rounded != nullptr) save_last(rounded + k, copies, aligned);
            continue;
        }
        save(p + k, ps, aligned);
        if (v != nullptr) save(v + k, vs, aligned);
        if (rounded != nullptr) save(rounded + k, copies, aligned);
    }
    i64 k = part.whole + threadIdx.x;
    if (k < part.end) {
        T x = (T)wide(p[k]), slope = (T)wide(g[k]);
        x = v != nullptr ? map(x, slope, v[k]) : map(x, slope);
        store(p[k], x);
        if (rounded != nullptr) store(rounded[k], x);
    }
}

// Update counts, last learning rates and flags of unused buffers after a step, by one block.
__device__ inline void commit(const Model& m, bool taken) {
    if (threadIdx.x == 0) {
        bool found = found_inf(m), rejected = !found && *m.offender < 2 * m.row_count;
        m.counts[taken ? 0 : rejected ? 2 : 1] += 1;
        if (rejected) {
            int row = *m.offender % m.row_count;
            const Sums& s = m.S[row];
            int cause = !is_finite(s.g) ? BAD_GRADIENT : !is_finite(s.p) ? BAD_PARAMETER : BAD_UPDATE;
            m.counts[3] = CAUSES * (i64)m.rows[row].number + cause;
        }
    }
    if (!taken) return;
    for (int i = threadIdx.x; i < m.row_count; i += THREADS) {  // rows of one parameter write the same
        const Row& row = m.rows[i];
        if (row.keeps) m.first[row.param] = false;
        m.previous_lr[row.param] = hyper_of(m, row)[LR];
    }
}

// Update a piece, by a block.
template <bool LAST, class P, class G> __device__ inline void update_piece(const Model& m, int piece) {
    typedef typename Computed<P>::type T;
    Part part(m, piece);
    const G* g = reinterpret_cast<const G*>(part.g);
    AffineMap<T> map(m.C + 6 * (i64)part.array.row);
    T* v = reinterpret_cast<T*>(part.array.v);
    T* master = reinterpret_cast<T*>(part.array.master);
    P* p = reinterpret_cast<P*>(part.array.p);
    if (master != nullptr) update<LAST>(part, master, g, v, p, map);
    else update<LAST>(part, p, g, v, (P*)nullptr, map);
}

// Third stage, core.apply: of `count` pieces from `first` on, one a block; `last` in the last launch for the model.
//
// Backwards, since `sums` leaves the end of the model in the cache.
template <class P, class G> __device__ inline void apply(const Model& m, int first, int count, int last) {
    bool taken = is_taken(m);
    if (blockIdx.x == 0 && last && m.decides) commit(m, taken);
    if (taken && (int)blockIdx.x < count) update_piece<false, P, G>(m, first + count - 1 - (int)blockIdx.x);
}
