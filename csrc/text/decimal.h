/* Writing float32 numbers as decimal text. */
#ifndef MODELBATCH_TEXT_DECIMAL_H
#define MODELBATCH_TEXT_DECIMAL_H

#ifdef __cplusplus
extern "C" {
#endif

/* The most characters that mb_write_f32 writes: -1.23456789e-38. */
#define MB_MAX_F32_TEXT 15

/* Writes a number with at most nine significant digits, from which float32 is read back with the
 * same bits; the form is that of printf's %.9g ("0.1", "1e-05", "-inf", "nan"). Nothing ends the
 * text. Returns where it ends. */
char* mb_write_f32(char* out, float value);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_TEXT_DECIMAL_H */
